"""Configs `folder/...`: sizes, classes and tasks are said once, or not at all."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image

from ant_lightning import GenerationMetrics, ImageFolderData
from ant_lightning.cli.configs import config_names
from ant_lightning.cli.derived_settings import derived_settings
from ant_lightning.cli.main import main
from ant_lightning.cli.report import write_report
from ant_lightning.generation import inception_file

SMALL = {
    "dit": ["--model.backbone.hidden_size=8", "--model.backbone.depth=1"],
    "adm": ["--model.backbone.model_channels=32", "--model.backbone.channel_mult=[1,1]"],
    "ldm": ["--model.backbone.model_channels=32", "--model.backbone.channel_mult=[1]"],
}
SMALL["dit"] += ["--model.backbone.num_heads=1"]
SMALL["sit"] = SMALL["dit"]
SMALL["adm"] += ["--model.backbone.num_res_blocks=1", "--model.backbone.attention_resolutions=[]"]
SMALL["ldm"] += ["--model.backbone.num_res_blocks=1", "--model.backbone.attention_resolutions=[]"]
FOLDER = sorted(name for name in config_names() if name.startswith("folder/"))


@pytest.fixture
def images(tmp_path):
    """Twelve images of three classes, of several sizes."""
    for i in range(12):
        folder = tmp_path / "images" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 30), (20 * i, 0, 100)).save(folder / f"{i}.png")
    return tmp_path / "images"


# Where there is one of 32 px, that of 64 px differs in numbers alone.
LARGE = {name for name in FOLDER if name.endswith("64") and f"{name[:-2]}32" in FOLDER}
SIZES = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in FOLDER]


@pytest.mark.parametrize("name", SIZES)
def test_a_folder_is_all_that_a_run_needs(name, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = name.split("/")[1].split("_")[0]
    if kind == "ldm":
        AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            **{
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
            },
        ).save_pretrained("vae")
        SMALL["ldm"].append("--model.first_stage.source=vae")
    quick = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.accelerator=cpu"]
    quick += ["--trainer.callbacks=null", "--data.batch_size=10", "--data.num_workers=0"]
    quick += ["--trainer.enable_progress_bar=false", "--model.tasks.clustering.num_tasks=3"]
    assert main(["fit", "--config", name, f"--data.root={images}", *quick, *SMALL[kind]]) == 0
    record = yaml.safe_load(
        (tmp_path / f"runs/folder_{name[7:]}/version_0/config.yaml").read_text()
    )
    backbone = record["model"]["init_args"]["backbone"]["init_args"]
    size = record["data"]["init_args"]["image_size"]
    assert size == int(name[-2:])
    expected = {"input_size": size, "in_channels": 3, "num_classes": 3}
    if kind == "ldm":
        expected |= {"input_size": size // 2, "in_channels": 4, "out_channels": 4}
    elif kind == "adm":
        expected |= {"out_channels": 3}
    elif name.startswith("folder/dit"):
        expected |= {"learn_sigma": False}
    assert backbone.items() >= expected.items()
    tasks = record["model"]["init_args"]["tasks"]
    assert tasks["balancer"]["init_args"]["num_tasks"] == 3


def options(*args):
    return dict(each[2:].split("=") for each in derived_settings(list(args)))


BACKBONE = "model.init_args.backbone.init_args."


def test_what_is_set_stays_and_what_follows_is_added(images):
    args = ["--config", str(config_names()["folder/adm_32"]), f"--data.root={images}"]
    sizes = {"input_size": "32", "in_channels": "3", "num_classes": "3", "out_channels": "3"}
    tasks = {"model.init_args.tasks.balancer.init_args.num_tasks": "5"}
    # Of the schedule in place of the linear one.
    own = {"model.init_args.process.init_args.schedule.init_args.num_timesteps": "1000"}
    assert options(*args) == {BACKBONE + name: value for name, value in sizes.items()} | tasks | own
    wide = options(*args, "--data.image_size=[32, 64]")
    assert wide[f"{BACKBONE}input_size"] == "[32, 64]"
    assert (
        options(*args, "--model.tasks.balancer=null", "--model.backbone.num_classes=0")
        == {BACKBONE + name: value for name, value in sizes.items() if name != "num_classes"} | own
    )
    found = options(*args, "--data.channels=1", "--model.process.variance_type=learned_range")
    assert (found[BACKBONE + "in_channels"], found[BACKBONE + "out_channels"]) == ("1", "2")
    shuffled = str(config_names()["clustering/shuffled"])
    fixed = "--model.tasks.clustering={class_path: FixedClustering, boundaries: [0, 9, 1000]}"
    assert options(*args, f"--config={shuffled}").items() >= tasks.items()
    assert options(*args, fixed)[next(iter(tasks))] == "2"


def test_classes_of_ones_own_have_a_number_of_tasks_too(tmp_path, monkeypatch):
    (tmp_path / "own_tasks.py").write_text(
        "from ant_lightning import LinearScalarization, SNRClustering\n"
        "class Mean(LinearScalarization):\n"
        "    def __init__(self, num_tasks, power=1.0):\n        super().__init__(num_tasks)\n"
        "class Seven(SNRClustering):\n"
        "    def __init__(self, num_tasks=7):\n        super().__init__(num_tasks)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    args = ["--config", str(config_names()["folder/adm_32"]), "--data.root=/nope"]
    balancer, clustering = (f"--model.tasks.{name}=" for name in ("balancer", "clustering"))
    place = "model.init_args.tasks.balancer.init_args.num_tasks"
    assert options(*args, balancer + "own_tasks.Mean")[place] == "5"
    assert options(*args, balancer + "own_tasks.Mean", clustering + "own_tasks.Seven")[place] == "7"
    for other in ("own_tasks.Mine", "no_such.Mean", "own_tasks.Mean, num_tasks: 3"):
        chosen = f"{balancer}{{class_path: {other}}}"
        assert place not in options(*args, chosen)


def test_a_dit_learns_the_variance_where_the_process_does():
    args = ["--config", str(config_names()["folder/dit_32"]), "--data.root=/nope"]
    name = BACKBONE + "learn_sigma"
    assert options(*args)[name] == "False"
    assert name not in options(*args, "--model.process.variance_type=learned_range")
    assert name not in options(*args, "--model.backbone.learn_sigma=true")
    flow = ["--config", str(config_names()["folder/sit_32"]), "--data.root=/nope"]
    assert name not in options(*flow)


def test_grey_folders_train_one_channel(tmp_path):
    for i in range(3):
        Image.new("L", (32, 32), i).save(tmp_path / f"{i}.png")
    args = ["--config", str(config_names()["folder/sit_32"]), f"--data.root={tmp_path}"]
    assert options(*args)[BACKBONE + "in_channels"] == "1"
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert options(*args)[BACKBONE + "in_channels"] == "1"
    Image.new("RGB", (32, 32)).save(tmp_path / "colour.png")
    assert options(*args)[BACKBONE + "in_channels"] == "3"


def test_sizes_of_a_unet_of_diffusers_are_those_of_the_images(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    small |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    model = {
        "class_path": "ant_lightning.MultiTaskDiffusion",
        "init_args": {
            "process": {"init_args": {"variance_type": "fixed_large"}},
            "backbone": {"class_path": "diffusers.UNet2DModel", "init_args": small},
            "sampling": {"guidance_scale": 1.0},
        },
    }
    (tmp_path / "unet.yaml").write_text(yaml.safe_dump({"model": model}))
    args = ["--config", "folder/dit_32", "--config", "unet.yaml", f"--data.root={images}"]
    args += ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.callbacks=null"]
    args += ["--data.batch_size=10", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    assert main(["fit", *args, "--trainer.enable_progress_bar=false"]) == 0
    record = yaml.safe_load((tmp_path / "runs/folder_dit_32/version_0/config.yaml").read_text())
    found = record["model"]["init_args"]["backbone"]["init_args"]
    assert (found["sample_size"], found["in_channels"], found["out_channels"]) == (32, 3, 3)


def test_a_size_that_does_not_fit_is_said_to_be_that_of_the_data(images, capsys):
    assert main(["fit", "--config=folder/dit_32", f"--data.root={images}", "--data.image_size=30"])
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("patch_size: must divide input_size 30, found 4; input_size is that of the data")
    )


def test_a_folder_that_is_missing_is_left_to_the_command(tmp_path, capsys):
    assert main(["fit", "--config=folder/dit_32", "--data.root=/nope", "--data.seed=0"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "ant-lightning: error: data.root: must be a folder of images, found nothing at /nope"
    )


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (19, 1), (35, 3)])
def test_a_tenth_is_held_out_by_default(count, held_out, tmp_path):
    for i in range(count):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
    data = ImageFolderData(str(tmp_path), image_size=4, batch_size=1, num_workers=0)
    assert (len(data.train_images), len(data.held_out_images)) == (count - held_out, held_out)
    assert data.settings()["num_held_out"] == held_out


def test_a_run_without_weights_of_inception_trains_without_scores(
    images, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(inception_file, "urlopen", offline)
    args = [
        "--config=folder/dit_32",
        f"--data.root={images}",
        *SMALL["dit"],
        "--data.batch_size=10",
    ]
    args += ["--trainer.callbacks=ant_lightning.GenerationMetrics", "--data.num_workers=0"]
    args += ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.accelerator=cpu"]
    message = r"no FID and no other score: weights: could not be .*; if none is wanted, `--scores f"
    with pytest.warns(UserWarning, match=message):
        assert main(["fit", *args]) == 0
    last = next((tmp_path / "runs").rglob("last.ckpt"))
    with pytest.warns(UserWarning, match=r"weights: could not be downloaded \(no network\)"):
        assert main(["validate", *args[:-3], args[-1], f"--ckpt_path={last}"]) == 0
    assert "val/loss" in capsys.readouterr().out
    wanted = [*args[:-3], args[-1], f"--ckpt_path={last}"]
    capsys.readouterr()
    assert main(["test", *wanted]) == 2  # before any image is drawn
    assert "error: weights: could not be downloaded" in capsys.readouterr().err
    run = str(last.parents[1])
    assert "network that scores had no weights" in write_report(Path(run)).read_text()
    drawn = tmp_path / "drawn"  # of the size of the data
    drawn.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(drawn / f"{i}.png")
    for command, option in (
        (["score", f"--config={run}/config.yaml", f"--images={drawn}"], "--metrics.extractor"),
        (["sweep", run, "--guidance", "1"], "--extractor"),
    ):
        assert main([*command, "--accelerator=cpu"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]  # after lines of Lightning's log
        assert "weights: could not be downloaded (no network); put" in line
        assert line.endswith(f"{option} ant_lightning.ShapesFeatures")
    assert main(["validate", *wanted, "--scores=false"]) == 0  # a warning would be an error
    few = ["--num_images=2", "--model.sampling.sampler.num_steps=2"]
    assert main(["predict", *wanted, *few]) == 0
    assert len(list((tmp_path / "runs").rglob("samples*/**/*.png"))) == 2
    assert GenerationMetrics().last_scores == {}
