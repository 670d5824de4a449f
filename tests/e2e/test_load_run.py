"""`load_run`: a ready module from a run's folder or a checkpoint, of trusted classes alone."""

import copy
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ant_lightning import (
    AutoencoderModule,
    ConfigError,
    DigitsData,
    DigitsFeatures,
    DiT,
    DiTModule,
    GenerationMetrics,
    load_run,
)
from ant_lightning.cli.main import main
from ant_lightning.cli.sweep import run_sweep
from ant_lightning.data.batch import to_uint8
from ant_lightning.errors import FileError

BACKBONE = {
    "class_path": "ant_lightning.DiT",
    "init_args": {
        "input_size": 8,
        "patch_size": 4,
        "in_channels": 1,
        "hidden_size": 8,
        "depth": 1,
        "num_heads": 1,
        "num_classes": 10,
    },
}
MODEL = {
    "class_path": "ant_lightning.DiTModule",
    "init_args": {
        "backbone": BACKBONE,
        "process": {
            "class_path": "ant_lightning.DiscreteDiffusion",
            "init_args": {
                "schedule": {"class_path": "ant_lightning.CosineSchedule"},
                "variance_type": "learned_range",
            },
        },
        "tasks": {
            "clustering": {
                "class_path": "ant_lightning.SNRClustering",
                "init_args": {"num_tasks": 3},
            },
            "balancer": {
                "class_path": "ant_lightning.UncertaintyWeighting",
                "init_args": {"num_tasks": 3},
            },
        },
        "optimization": {
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
        },
        "sampling": {
            "sampler": {"class_path": "ant_lightning.DDIM", "init_args": {"num_steps": 2}}
        },
    },
}
SCORES = {
    "class_path": "ant_lightning.GenerationMetrics",
    "init_args": {
        "extractor": {"class_path": "ant_lightning.DigitsFeatures"},
        "num_images": 30,
        "with_train": False,
    },
}
QUIET = {
    "accelerator": "cpu",
    "max_steps": 3,
    "max_epochs": -1,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit(folder, model, *, seed=7, callbacks=()):
    """Train with the command line; returns the run's folder."""
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "tiny"},
    }
    data = {"class_path": "ant_lightning.DigitsData", "init_args": {"batch_size": 20}}
    settings = {
        "seed_everything": seed,
        "trainer": {**QUIET, "logger": logger, "callbacks": list(callbacks)},
        "ema": {
            "decay": 0.5,
            "warmup": False,
            "lengths": [0.05, 0.1, 0.2],
            "snapshot_every": 1,
        },
        "data": data,
        "model": model,
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", str(path)]) == 0
    return folder / "tiny" / "version_0"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("run"), MODEL, callbacks=[SCORES])


@pytest.fixture(autouse=True)
def _another_process():
    """The seed of a run is not in the environment of who loads it."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)


def last(run):
    return run / "checkpoints" / "last.ckpt"


def content(run):
    return torch.load(last(run), weights_only=True)


def averages(found):
    return next(s["averages"] for s in found["callbacks"].values() if "averages" in s)


def assert_holds(module, weights):
    state = module.backbone.state_dict()
    for name, value in weights.items():
        assert torch.equal(state[name], value), name


def test_a_folder_and_a_checkpoint_give_a_module_that_is_ready(run):
    live = {
        name.removeprefix("backbone."): value
        for name, value in content(run)["state_dict"].items()
        if name.startswith("backbone.")
    }
    for path in (run, run / "checkpoints", last(run), str(run)):
        module = load_run(path)
        assert isinstance(module, DiTModule)
        assert isinstance(module.backbone, DiT)
        assert not any(each.training for each in module.modules())
        assert (module.seed, module.trained_steps, module.sampler.num_steps) == (7, 3, 2)
        assert_holds(module, averages(content(run)))
    assert_holds(load_run(run, weights="model"), live)
    different = averages(content(run))["final_layer.linear.weight"]
    assert not torch.equal(live["final_layer.linear.weight"], different)


def test_the_average_of_a_length(run, tmp_path):
    module = load_run(run, ema_length=0.1)
    assert_holds(module, content(run)["callbacks"]["EMA"]["powers"][0.1])
    between, moved = load_run(run, ema_length=0.13), tmp_path / "w.ckpt"
    tracked = [load_run(run, ema_length=each).backbone.state_dict() for each in (0.1, 0.2)]
    weight = "final_layer.linear.weight"
    assert not any(torch.equal(between.backbone.state_dict()[weight], t[weight]) for t in tracked)
    torch.save(content(run), moved)  # away from its snapshots
    with pytest.raises(ConfigError, match=r"ema_length: .* found 0\.13, .* and 0 snapshots"):
        load_run(moved, ema_length=0.13, config=run / "config.yaml")
    for wrong, message in (
        ({"ema_length": 0.3}, "ema_length: must be above 0 and below 0.289, found 0.3"),
        ({"ema_length": 0.1, "weights": "model"}, "ema_length: must be None .* found 0.1"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_run(run, **wrong)


@pytest.mark.parametrize("length", [None, 0.2, 0.13])
def test_it_draws_what_predict_draws(run, tmp_path, length):
    """Seed, sampler and averages are those of the run."""
    args = ["predict", "--config", str(run / "config.yaml"), "--ckpt_path", str(last(run))]
    args += ["--samples.num_images=4", f"--samples.folder={tmp_path / 'drawn'}"]
    args += [] if length is None else [f"--ema.length={length}"]
    assert main([*args, f"--trainer.logger.save_dir={tmp_path}"]) == 0
    drawn = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "drawn").glob("*.png"))]
    images = to_uint8(load_run(run, ema_length=length).sample(4))[:, 0].numpy()
    # The same arithmetic, so that at most a rounding to whole numbers can differ.
    assert np.abs(np.stack(drawn).astype(int) - images.astype(int)).max() <= 1


def stored(folder, found, model, **settings):
    """A checkpoint alone, which holds the settings as the command line stores them."""
    found = copy.copy(found)
    found["ant_lightning"] = {
        **found["ant_lightning"],
        "settings": {"seed_everything": 7, "model": model, **settings},
    }
    torch.save(found, folder / "w.ckpt")
    return folder / "w.ckpt"


def without(found, *names):
    kept = {name: value for name, value in found["ant_lightning"].items() if name not in names}
    return {**found, "ant_lightning": kept}


def test_the_settings_in_a_checkpoint_come_before_those_in_the_folder(run, tmp_path):
    other = copy.deepcopy(MODEL)
    other["init_args"]["sampling"]["sampler"]["init_args"]["num_steps"] = 5
    (tmp_path / "checkpoints").mkdir()
    path = stored(tmp_path / "checkpoints", content(run), other)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    assert load_run(path).sampler.num_steps == 5
    assert load_run(tmp_path).sampler.num_steps == 5
    assert load_run(tmp_path, config=run / "config.yaml").sampler.num_steps == 2
    torch.save(without(content(run), "settings"), path)
    assert load_run(path).sampler.num_steps == 2


def test_without_settings_they_are_asked_for(run, tmp_path):
    torch.save(without(content(run), "settings"), tmp_path / "w.ckpt")
    with pytest.raises(ConfigError, match=r"config: needed, .*w\.ckpt holds no settings"):
        load_run(tmp_path / "w.ckpt")
    module = load_run(tmp_path / "w.ckpt", config=run / "config.yaml")
    assert_holds(module, averages(content(run)))
    (tmp_path / "other.yaml").write_text("trainer: {max_steps: 3}\n")
    for path, message in (
        ("other.yaml", "must hold the settings of a model"),
        ("no.yaml", "found nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_run(tmp_path / "w.ckpt", config=tmp_path / path)


def test_a_folder_without_a_checkpoint_and_other_words_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="of a run with a checkpoint, found no checkpoint in it"):
        load_run(tmp_path)
    with pytest.raises(ConfigError, match=r"no\.ckpt: must be the folder of a run or a checkpoint"):
        load_run(tmp_path / "no.ckpt")
    with pytest.raises(ConfigError, match="weights: must be 'ema' or 'model', found 'best'"):
        load_run(run, weights="best")
    found = content(run)
    found["callbacks"] = {}
    torch.save(found, tmp_path / "w.ckpt")
    with pytest.raises(ConfigError, match="which holds model, found ema"):
        load_run(tmp_path / "w.ckpt", config=run / "config.yaml")
    load_run(tmp_path / "w.ckpt", config=run / "config.yaml", weights="model")


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_cannot_run_code(run, tmp_path):
    found = {**content(run), "extra": Command(tmp_path / "ran")}
    torch.save(found, tmp_path / "w.ckpt")
    with pytest.raises(FileError, match="refused, because reading it would call"):
        load_run(tmp_path / "w.ckpt", config=run / "config.yaml")
    assert not (tmp_path / "ran").exists()


OWN = """
import pathlib
pathlib.Path(__file__).with_suffix(".imported").touch()
from ant_lightning.backbones import DiT
class Own(DiT):
    pass
def optimizer(groups):
    raise SystemExit
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module that somebody has in their working folder, and that says if it was imported."""
    (tmp_path / "own_net.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "own_net.imported"
    sys.modules.pop("own_net", None)


@pytest.mark.parametrize(
    ("place", "value", "name"),
    [
        ("backbone", {**BACKBONE, "class_path": "own_net.Own"}, "own_net.Own"),
        ("backbone", "own_net.Own", "own_net.Own"),
        ("optimizer", "own_net.optimizer", "own_net.optimizer"),
        ("optimizer", {"class_path": "own_net.optimizer"}, "own_net.optimizer"),
        ("lr_scheduler", "os.system", "os.system"),
        ("schedule", {"class_path": "missing_net.Schedule"}, "missing_net.Schedule"),
        ("loss_weighting", {"class_path": "ant_lightning_2.Own"}, "ant_lightning_2.Own"),
        (
            "clustering",
            {
                "class_path": "ant_lightning.ShuffledClustering",
                "init_args": {"clustering": {"class_path": "own_net.Own"}},
            },
            "own_net.Own",
        ),
        ("class_path", "own_net.Own", "own_net.Own"),
    ],
)
@pytest.mark.parametrize("where", ["checkpoint", "file"])
def test_classes_of_others_need_trust_and_are_not_imported(
    run, tmp_path, own, place, value, name, where
):
    model = copy.deepcopy(MODEL)
    (model if place == "class_path" else model["init_args"])[place] = value
    if where == "checkpoint":
        path, config = stored(tmp_path, content(run), model), None
    else:
        path, config = last(run), tmp_path / "c.yaml"
        config.write_text(yaml.safe_dump({"model": model}))
    package = name.rpartition(".")[0]
    with pytest.raises(
        ConfigError, match=rf"trust: the settings name {name}, .*set trust to '{package}'"
    ):
        load_run(path, config=config)
    assert not own.exists()


def test_what_is_trusted_is_made(run, tmp_path, own):
    model = copy.deepcopy(MODEL)
    model["init_args"]["backbone"] = {**BACKBONE, "class_path": "own_net.Own"}
    found = content(run)
    found["ant_lightning"]["backbone"] = "Own"
    path = stored(tmp_path, found, model)
    for trust in (["own_net"], ["own_net.Own"], "own_net"):
        assert type(load_run(path, trust=trust).backbone).__name__ == "Own"
    with pytest.raises(ConfigError, match="trust"):
        load_run(path, trust=["own_ne", "own_net.O"])


def test_the_file_that_it_started_from_is_not_asked_for_again(run, tmp_path):
    model = copy.deepcopy(MODEL)
    torch.save({}, tmp_path / "other.pt")
    for file in ("gone.pt", "other.pt"):
        model["init_args"]["init_from"] = str(tmp_path / file)
        module = load_run(stored(tmp_path, content(run), model))
        assert_holds(module, averages(content(run)))


def test_settings_of_another_model_are_refused(run, tmp_path):
    model = copy.deepcopy(MODEL)
    model["init_args"]["backbone"]["init_args"]["hidden_size"] = 16
    with pytest.raises(ConfigError, match=r"backbone: must be that of the checkpoint"):
        load_run(stored(tmp_path, content(run), model))
    model = copy.deepcopy(MODEL)
    model["init_args"]["no_such"] = 1
    with pytest.raises(ConfigError, match="no_such"):
        load_run(stored(tmp_path, content(run), model))


def test_an_autoencoder_is_loaded_too(tmp_path):
    model = {
        "class_path": "ant_lightning.AutoencoderModule",
        "init_args": {"in_channels": 1, "widths": [16, 16], "latent_channels": 1},
    }
    run = fit(tmp_path, model)
    module = load_run(run)
    assert isinstance(module, AutoencoderModule)
    assert_holds(module, averages(content(run)))


# 30 images do for equality, not for a FID that means something.
@pytest.mark.filterwarnings("ignore::ant_lightning.generation.frechet.RankDeficientWarning")
def test_a_sweep_scores_guidance_scales_and_ema_lengths(run, capsys):
    rows = run_sweep([str(run), "--guidance", "1", "3", "--ema", "0.1", "0.2", "--accelerator=cpu"])
    assert [(row["ema_length"], row["guidance_scale"]) for row in rows] == [
        *((0.1, 1.0), (0.1, 3.0)),
        *((0.2, 1.0), (0.2, 3.0)),
    ]
    assert [json.loads(line) for line in (run / "sweep.jsonl").read_text().splitlines()] == rows
    with Image.open(run / "sweep.png") as picture:
        assert picture.width > 1000
    said = capsys.readouterr().out
    assert "guidance 3, EMA length 0.2: fid" in said
    assert said.count("sweep: 30 of 30 images drawn and scored\n") == 4
    best = min(rows, key=lambda row: row["scores"]["fid"])
    assert f"sweep: the lowest fid is {best['scores']['fid']:.4g}, at guidance " in said
    assert f"all scores are in {run / 'sweep.jsonl'}, a plot in {run / 'sweep.png'}\n" in said
    data = DigitsData()
    data.setup("test")
    metric = GenerationMetrics(DigitsFeatures(), with_train=False).new_scores(
        data, seed=7, device="cpu"
    )
    images = load_run(run, ema_length=0.2).sample(30, guidance_scale=3.0)
    metric.update(to_uint8(images))
    assert rows[3]["scores"] == pytest.approx(metric.compute(), rel=1e-4, abs=1e-5)
    for args, line in (
        ([str(run)], "guidance: needs values, as in --guidance 1 1.5 2, or --ema does; found none"),
        ([str(run / "checkpoints"), "--guidance", "1"], "must be the folder of a run"),
        ([str(run), "--ema", "0.9"], "ema_length"),
        (
            [str(run), "--guidance", "1", "--extractor", "ant_lightning.ShapesFeatures"],
            "images: must have 3 channels for ShapesFeatures, found 1",
        ),
        (
            [str(run), "--guidance", "1", "--extractor", "Shapes"],
            "error: metrics.extractor: no class is called 'Shapes'",
        ),
    ):
        assert main(["sweep", *args, "--accelerator=cpu"]) == 2
        assert line in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::ant_lightning.generation.frechet.RankDeficientWarning")
def test_a_sweep_over_data_of_ones_own_needs_trust(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_data.py").write_text(
        "from ant_lightning import DigitsData\n\nclass OwnData(DigitsData):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = tmp_path / "run"
    shutil.copytree(run, own)
    record = own / "config.yaml"
    record.write_text(record.read_text().replace("ant_lightning.DigitsData", "own_data.OwnData"))
    args = ["sweep", str(own), "--guidance", "1", "--num_images=30", "--accelerator=cpu"]
    assert main(args) == 2
    assert "trust: the settings name own_data.OwnData" in capsys.readouterr().err
    assert main([*args, "--trust=own_data"]) == 0
    first, last, about, row, _ = capsys.readouterr().out.splitlines()
    assert first == "sweep: 0 of 30 images drawn and scored"
    assert last == "sweep: 30 of 30 images drawn and scored"
    assert about.startswith("sweep: features of the network for digits")
    assert about.endswith("30 generated images against 360 held-out images")
    assert row.startswith("guidance 1: fid")


@pytest.mark.filterwarnings("ignore:losses. must depend on the parameters")  # a base of zeros
def test_an_adapter_finds_its_base_in_init_from_again(tmp_path):
    torch.manual_seed(3)
    torch.save(DiT(**BACKBONE["init_args"]).state_dict(), tmp_path / "base.pt")
    adapter = {"class_path": "ant_lightning.LoRA"}
    adapter["init_args"] = {"r": 2, "target_modules": ["qkv", "proj"]}
    model = copy.deepcopy(MODEL)
    model["init_args"] |= {"adapter": adapter, "init_from": str(tmp_path / "base.pt")}
    run = fit(tmp_path, model)
    one, two = load_run(run, weights="model"), load_run(run, weights="model")
    base = torch.load(tmp_path / "base.pt", weights_only=True)
    qkv = "blocks.0.attn.qkv"
    found = one.backbone.state_dict()
    assert torch.equal(found[f"{qkv}.base_layer.weight"], base[f"{qkv}.weight"])
    assert torch.equal(one.sample(2), two.sample(2))
