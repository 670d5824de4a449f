"""The command line, called in process as a user would call it."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ant_lightning import EMA, ConflictMonitor, GenerationMetrics, SampleGrid
from ant_lightning.cli.main import main
from ant_lightning.cli.parser import run
from ant_lightning.cli.records import with_run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASE = CONFIGS / "digits" / "dit.yaml"
BALANCERS = sorted((CONFIGS / "balancer").glob("*.yaml"))
CLUSTERINGS = sorted((CONFIGS / "clustering").glob("*.yaml"))
TINY = [
    "--model.init_args.backbone.init_args.hidden_size=16",
    "--model.init_args.backbone.init_args.depth=1",
    "--model.init_args.backbone.init_args.num_heads=2",
    "--model.init_args.sampling.sampler.init_args.num_steps=2",
    "--data.init_args.batch_size=20",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
]


def affinity_file(folder):
    centres = np.arange(0, 1000, 50)
    affinity = np.exp(-np.abs(centres[:, None] - centres[None]) / 200.0)
    path = folder / "affinity.npz"
    np.savez(path, affinity=affinity, timesteps=centres, num_timesteps=np.array(1000))
    return path


def arguments(folder, *files, command="fit"):
    args = [command, *[x for file in (BASE, *files) for x in ("--config", str(file))], *TINY]
    args += [f"--trainer.logger.init_args.save_dir={folder}"]
    if any(file.stem == "gradient" for file in files):
        args += [f"--model.init_args.tasks.clustering.init_args.affinity={affinity_file(folder)}"]
    return args


def pairs():
    """Every balancer and every clustering, all pairs in the slow tests."""
    for balancer, clustering in product(BALANCERS, CLUSTERINGS):
        quick = clustering.stem == "snr" or balancer.stem == "pcgrad"
        marks = () if quick else (pytest.mark.slow,)
        yield pytest.param(balancer, clustering, marks=marks)


@pytest.mark.parametrize(("balancer", "clustering"), list(pairs()), ids=lambda p: p.stem)
def test_every_pair_of_fragments_trains_and_loses_nothing(tmp_path, balancer, clustering):
    cli = run([*arguments(tmp_path, balancer, clustering), "--trainer.limit_val_batches=0"])
    wanted = yaml.safe_load(balancer.read_text())["model"]["init_args"]["tasks"]["balancer"]
    found = type(cli.model.balancer).__name__ if cli.model.balancer else None
    assert found == (wanted and wanted["class_path"].split(".")[-1])
    kinds = {type(c) for c in cli.trainer.callbacks}
    assert {EMA, ConflictMonitor, SampleGrid, GenerationMetrics} <= kinds
    ema = next(c for c in cli.trainer.callbacks if isinstance(c, EMA))
    assert (ema.decay, ema.num_updates) == (0.999, 2)
    assert cli.trainer.global_step == 2
    assert cli.model.clusters.num_tasks == 5
    assert len(list(tmp_path.rglob("last.ckpt"))) == 1


def test_fit_validate_test_and_predict_share_one_checkpoint(tmp_path, capsys):
    files = [CONFIGS / "balancer" / "uw.yaml", CONFIGS / "clustering" / "snr.yaml"]
    fit = run(arguments(tmp_path, *files))
    in_fit = {name: float(v) for name, v in fit.trainer.callback_metrics.items()}
    last = next(tmp_path.rglob("last.ckpt"))
    log_dir = Path(fit.trainer.log_dir)
    grids = list(log_dir.glob("*grid.png"))
    assert len(grids) == 1
    validate = run([*arguments(tmp_path, *files, command="validate"), f"--ckpt_path={last}"])
    measured = {name: float(v) for name, v in validate.trainer.callback_metrics.items()}
    for name in ("val/fid", "val/precision", "val/loss", "val/task_3/loss", "val/fid_real"):
        assert measured[name] == pytest.approx(in_fit[name], rel=1e-6), name
    row = json.loads((log_dir / "generation_metrics.jsonl").read_text().splitlines()[-1])
    assert row["scores"]["num_images"] == 360
    assert row["guidance_scale"] == 1.5
    test = run(with_run(["test", str(log_dir)]))
    measured = {name: float(v) for name, v in test.trainer.callback_metrics.items()}
    for name in ("fid", "loss", "task_3/loss"):
        assert measured[f"test/{name}"] == pytest.approx(in_fit[f"val/{name}"], rel=1e-6), name
    assert not any(name.startswith("val/") for name in measured)
    folder = tmp_path / "images"
    predict = [
        "predict",
        str(log_dir),
        "--samples.num_images=7",
        "--samples.batch_size=3",
        f"--samples.folder={folder}",
    ]
    assert main(predict) == 0
    images = [f"{i:06d}.png" for i in range(7)]
    assert sorted(p.name for p in folder.iterdir()) == [*images, "identity.json"]
    assert str(folder) in capsys.readouterr().out


def test_a_run_stands_for_its_config_and_its_checkpoint(tmp_path, capsys):
    record = tmp_path / "config_1.yaml"
    for file in (tmp_path / "config.yaml", record):
        file.write_text("model: {}")
    checkpoint = tmp_path / "checkpoints" / "step_7.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"")
    for named in (tmp_path, checkpoint):
        found = with_run(["predict", str(named), "--num_images", "3"])
        options = [f"--config={record}", f"--ckpt_path={named}", "--num_images", "3"]
        assert found == ["predict", *options]
    record.write_text("trainer: {limit_val_batches: 0}")  # as a run without validation has it
    measured = ["--trainer.limit_val_batches=1.0", "--scores=false"]
    assert with_run(["validate", str(tmp_path), "--scores=false"])[-2:] == measured
    for other in (["validate", "--config", "digits/dit"], ["fit", str(tmp_path)], ["validate"]):
        assert with_run(other) == other
    for nothing in (["validate"], ["predict", "--num_images", "3"]):
        assert main(nothing) == 2
        assert "RUN: needed, found nothing; give the folder of a run" in capsys.readouterr().err
    assert main(["validate", str(CONFIGS)]) == 2
    assert f"{CONFIGS}: must be the folder of a run" in capsys.readouterr().err


def test_help_names_every_command_and_needs_no_torch(capsys):
    import subprocess
    import sys

    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("fit", "validate", "test", "predict"))
    code = (
        "import sys; from ant_lightning.cli.main import main; main(['--help']); "
        "sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_balancing_clustering_diffusion_and_analysis_do_not_import_lightning():
    import subprocess
    import sys

    code = (
        "import sys, ant_lightning.balancing, ant_lightning.tasks, ant_lightning.diffusion, "
        "ant_lightning.affinity, ant_lightning.backbones\n"
        "bad = {'lightning', 'torchmetrics', 'torchvision', 'diffusers', 'jsonargparse', "
        "'matplotlib', 'cvxpy'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# More are in wrong_settings.py.
BAD = {
    "unknown schedule": (["--model.init_args.process.schedule=Cosinus"], ["Cosinus"]),
    "k above T": (
        ["--model.init_args.tasks.clustering.init_args.num_tasks=1001"],
        ["num_tasks", "1000", "1001"],
    ),
    "k below 1": (["--model.init_args.tasks.clustering.init_args.num_tasks=0"], ["num_tasks", "0"]),
    "boundaries out of order": (
        [
            "--model.init_args.tasks.clustering=FixedClustering",
            "--model.init_args.tasks.clustering.init_args.boundaries=[0, 500, 400, 1000]",
        ],
        ["boundaries", "500", "400"],
    ),
    "batch below k": (
        [
            "--data.init_args.batch_size=4",
            "--model.init_args.tasks.balancer=PCGrad",
            "--model.init_args.tasks.balancer.init_args.num_tasks=5",
            "--model.init_args.timesteps.method=stratified",
        ],
        ["batch_size", "5", "4"],
    ),
    "image size": (["--model.init_args.backbone.init_args.input_size=16"], ["input_size", "16"]),
    "channels": (["--model.init_args.backbone.init_args.in_channels=3"], ["in_channels", "3"]),
    "classes": (["--model.init_args.backbone.init_args.num_classes=7"], ["num_classes", "10", "7"]),
    "learned variance": (
        ["--model.process.variance_type=fixed_small", "--model.backbone.learn_sigma=true"],
        ["backbone.learn_sigma: must be false", "fixed_small", "found true"],
    ),
    "ema": (["--ema.decay=1.5"], ["ema.decay", "1.5"]),
    "dropout": (["--model.init_args.class_dropout=1.5"], ["class_dropout", "1.5"]),
    "specialist with clusters": (
        ["--model.init_args.timesteps.interval=[900, 1100]"],
        ["timesteps.interval", "1000", "1100"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line_and_exit_code_2(tmp_path, capsys, name):
    options, words = BAD[name]
    files = [CONFIGS / "balancer" / "vanilla.yaml"]
    assert main([*arguments(tmp_path, *files), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert all(word in error[0] for word in words), error[0]


def test_a_checkpoint_of_other_clusters_is_refused_and_both_are_named(tmp_path, capsys):
    files = [CONFIGS / "balancer" / "uw.yaml", CONFIGS / "clustering" / "snr.yaml"]
    run([*arguments(tmp_path, *files), "--trainer.limit_val_batches=0"])
    last = next(tmp_path.rglob("last.ckpt"))
    files[1] = CONFIGS / "clustering" / "timestep.yaml"
    args = [*arguments(tmp_path, *files, command="validate"), f"--ckpt_path={last}"]
    assert main(args) == 2
    error = capsys.readouterr().err
    assert "clustering" in error
    assert "[0, 200, 400, 600, 800, 1000]" in error


def test_nan_weights_stop_the_run_after_the_set_number_of_steps(tmp_path, capsys):
    from ant_lightning.errors import NonFiniteError

    files = [CONFIGS / "balancer" / "pcgrad.yaml", CONFIGS / "clustering" / "snr.yaml"]
    args = [*arguments(tmp_path, *files), "--model.init_args.optimization.max_skipped_steps=3"]
    args += ["--model.init_args.optimization.optimizer.init_args.lr=1e30", "--trainer.max_steps=50"]
    args += ["--model.init_args.optimization.warmup_steps=0", "--trainer.limit_val_batches=0"]
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        run(args)
    assert main(args) == 1
    assert "max_skipped_steps" in capsys.readouterr().err


def test_weights_of_a_checkpoint_are_those_of_training_not_the_averages(tmp_path):
    files = [CONFIGS / "balancer" / "linear.yaml", CONFIGS / "clustering" / "snr.yaml"]
    cli = run(arguments(tmp_path, *files))
    state = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    averages = state["callbacks"]["EMA"]["averages"]
    live = dict(cli.model.backbone.named_parameters())
    for name in averages:
        assert torch.equal(state["state_dict"][f"backbone.{name}"], live[name])
    assert any(not torch.equal(averages[name], live[name]) for name in averages)
    assert not any("ema" in name or "extractor" in name for name in state["state_dict"])
