"""Every run of the paper's tables, composed from fragments: sizes as published, two steps each."""

import json
from importlib import import_module
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from first_stages import save_first_stages
from jsonargparse import ArgumentParser

from ant_lightning import FirstStage, ImageDataModule, ImageFolderData, LatentsData, ShapesData
from ant_lightning.cli.parser import run

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
# Model -> manifest, and what makes it small enough for two steps.
UNET = [
    "--model.backbone=ant_lightning.UNet",
    "--model.backbone.input_size=8",
    "--model.backbone.model_channels=32",
    "--model.backbone.channel_mult=[1]",
    "--model.backbone.num_res_blocks=1",
]
DIT = [
    "--model.backbone=ant_lightning.DiT",
    "--model.backbone.input_size=8",
    "--model.backbone.hidden_size=32",
    "--model.backbone.depth=1",
    "--model.backbone.num_heads=2",
    "--model.backbone.num_classes=3",
]
MODELS = {
    "ffhq/adm": ("adm_p2_ffhq256_light", 8, [*UNET, "--model.backbone.out_channels=6"]),
    "celebahq/adm": ("adm_p2_ffhq256_light", 8, [*UNET, "--model.backbone.out_channels=6"]),
    "ffhq/ldm": ("ldm_ffhq256", 16, UNET),
    "celebahq/ldm": ("ldm_celeba256", 16, UNET),
    "imagenet/dit_s2": ("dit_s_2", 16, DIT),
    "imagenet/dit_l2": ("dit_l_2", 16, DIT),
    "imagenet/adm_64": (
        "adm_imagenet64_cond",
        8,
        [*UNET, "--model.backbone.out_channels=6", "--model.backbone.num_classes=3"],
    ),
}
FIRST = ("ffhq/adm", "ffhq/ldm", "imagenet/dit_s2")
BALANCERS = ("vanilla", "linear", "uw", "pcgrad", "nash")
CLUSTERINGS = ("timestep", "snr", "gradient")
METHODS = [("vanilla", "snr"), *((b, c) for b in BALANCERS[1:] for c in CLUSTERINGS)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny first stages, and an affinity file for the gradient clustering."""
    root = save_first_stages(tmp_path_factory.mktemp("paper"))
    centres = np.arange(0, 1000, 50)
    affinity = np.exp(-np.abs(centres[:, None] - centres[None]) / 200.0)
    np.savez(
        root / "affinity.npz", affinity=affinity, timesteps=centres, num_timesteps=np.array(1000)
    )
    return root


@pytest.fixture(scope="module")
def parser():
    """The model and data part of the command line, which is 10 times faster to call."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(L.LightningModule, "model")
    parser.add_subclass_arguments(ImageDataModule, "data")
    for name in ("trainer", "ema", "checkpoint"):
        parser.add_argument(f"--{name}", type=dict)
    parser.add_argument("--seed_everything", type=int)
    return parser


def arguments(model, method, place, *, fit=False):
    """What a user types for a run."""
    balancer, clustering = method
    files = [f"{model}.yaml", f"balancer/{balancer}.yaml", f"clustering/{clustering}.yaml"]
    args = [x for file in files for x in ("--config", str(CONFIGS / file))]
    if balancer != "vanilla":  # the command line takes it from the clustering
        args += ["--model.tasks.balancer.num_tasks=5"]
    if clustering == "gradient":
        args += [f"--model.tasks.clustering.affinity={place / 'affinity.npz'}"]
    if "adm" not in model:
        kind = "vq" if "ldm" in model else "kl"
        args += [f"--model.first_stage.source={place / kind}"]
    return args


def merged(model, method, place):
    """The same without the data, merged here: parsing file after file takes three times as long."""
    result = {}
    options = arguments(model, method, place)
    for file in options[1:6:2]:
        merge(result, {"model": yaml.safe_load(Path(file).read_text())["model"]})
    for option in options[6:]:
        path, value = option.removeprefix("--model.").split("=")
        *groups, owner, name = path.split(".")
        setting = {owner: {"init_args": {name: yaml.safe_load(value)}}}
        for group in groups:
            setting = {group: setting}
        merge(result, {"model": {"init_args": setting}})
    return result


def merge(base, fragment):
    for key, value in fragment.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            if value.get("class_path", base[key].get("class_path")) != base[key].get("class_path"):
                base[key].pop("init_args", None)
            merge(base[key], value)
        else:
            base[key] = value


def meta_backbone(settings):
    """The network of a run, without memory for its weights."""
    backbone = settings.model.init_args.backbone
    package, name = backbone.class_path.rsplit(".", 1)
    with torch.device("meta"):
        return getattr(import_module(package), name)(**backbone.init_args.as_dict())


@pytest.mark.parametrize("model", MODELS)
def test_each_model_has_the_published_size(parser, place, model):
    manifest = json.loads(
        (ROOT / "tests/golden/A_manifests" / f"{MODELS[model][0]}.json").read_text()
    )
    backbone = meta_backbone(parser.parse_args(arguments(model, ("vanilla", "snr"), place)))
    found = {name: list(value.shape) for name, value in backbone.state_dict().items()}
    assert found == {name: list(shape) for name, shape in manifest["state_dict"].items()}
    assert sum(p.numel() for p in backbone.parameters()) == manifest["total_params"]


# The others differ from these in numbers alone.
OF_EACH_KIND = [
    pytest.param(model, marks=() if model in FIRST else pytest.mark.slow) for model in MODELS
]


# The methods do not depend on the model: one takes all of them in the quick tests.
ALL_METHODS = [
    pytest.param(model, marks=() if model == FIRST[0] else pytest.mark.slow) for model in MODELS
]


@pytest.mark.parametrize("model", ALL_METHODS)
def test_every_method_composes_with_every_model(parser, place, model):
    backbone = None
    for method in METHODS:
        settings = parser.parse_object(merged(model, method, place))
        if backbone is None:
            backbone = meta_backbone(settings)
        settings.model.init_args.backbone = backbone
        module = parser.instantiate_classes(settings).model
        balancer, clustering = method
        wanted = {"vanilla": None, "linear": "LinearScalarization", "uw": "UncertaintyWeighting"}
        wanted |= {"pcgrad": "PCGrad", "nash": "NashMTL"}
        found = type(module.balancer).__name__ if module.balancer else None
        assert found == wanted[balancer]
        assert module.num_tasks == 5
        equal = module.clusters.boundaries == (0, 200, 400, 600, 800, 1000)
        assert equal == (clustering == "timestep")
        assert module.timesteps.method == ("uniform" if balancer == "vanilla" else "stratified")
        assert (module.first_stage is None) == ("adm" in model)


@pytest.mark.parametrize("model", OF_EACH_KIND)
def test_two_steps_of_every_balancer(parser, place, model, tmp_path):
    _, size, small = MODELS[model]
    for balancer in BALANCERS:
        args = [*arguments(model, (balancer, "timestep"), place), *small]
        settings = parser.parse_args(args)
        batch_size = settings.data.init_args.batch_size
        assert batch_size >= 5
        settings.data = None
        module = parser.instantiate_classes(settings).model
        before = module.backbone.state_dict()
        before = {name: value.clone() for name, value in before.items()}
        data = ShapesData(
            image_size=size, num_images=20, num_held_out=2, num_classes=3, batch_size=5
        )
        trainer = L.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_steps=2,
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
        assert trainer.global_step == 2
        assert module.num_skipped_steps == 0
        after = module.backbone.state_dict()
        # The layers before one that starts at zero move with the second step.
        assert sum(not torch.equal(before[name], after[name]) for name in before) > 4
        assert not any("first_stage" in name for name in module.state_dict())


def test_a_shipped_run_on_a_folder_of_images_from_the_command_line(place, tmp_path):
    """All of it at once: the real command, files of images, a checkpoint, a grid."""
    from PIL import Image

    (tmp_path / "images").mkdir()
    shapes = ShapesData(image_size=40, num_images=12, num_classes=3)
    pixels = next(shapes.pixels(shapes.train_images))
    for number, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{number}.png")
    cli = run(
        [
            "fit",
            *arguments("ffhq/ldm", ("uw", "snr"), place),
            "--model.backbone.model_channels=32",
            "--model.backbone.input_size=8",
            "--model.sampling.sampler.num_steps=2",
            f"--data.root={tmp_path / 'images'}",
            "--data.image_size=16",
            "--data.batch_size=5",
            "--data.num_held_out=2",
            "--data.num_workers=0",
            "--trainer.max_steps=2",
            "--trainer.val_check_interval=2",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            f"--trainer.logger.save_dir={tmp_path}",
        ]
    )
    assert isinstance(cli.datamodule, ImageFolderData)
    log_dir = Path(cli.trainer.log_dir)
    state = torch.load(next(log_dir.rglob("last.ckpt")), weights_only=True)
    assert all(name.startswith(("backbone.", "balancer.")) for name in state["state_dict"])
    assert len(list(log_dir.glob("*grid.png"))) == 1


def test_the_cache_fragment_replaces_the_folder_and_keeps_the_batch(parser, place):
    args = arguments("imagenet/dit_s2", ("vanilla", "snr"), place)
    args += ["--config", str(CONFIGS / "imagenet/latents.yaml")]
    data = parser.parse_args(args).data
    assert data.class_path.endswith(LatentsData.__name__)
    assert data.init_args.batch_size == 50
    assert data.init_args.cache == "data/imagenet/latents"


def test_the_encode_config_names_the_images_and_first_stage_of_the_runs(parser, place):
    encode = yaml.safe_load((CONFIGS / "imagenet/encode.yaml").read_text())
    for name in ("dit_s2", "dit_l2"):
        run_of = yaml.safe_load((CONFIGS / f"imagenet/{name}.yaml").read_text())
        for key in ("root", "image_size", "num_held_out", "labels"):
            assert encode["data"]["init_args"][key] == run_of["data"]["init_args"][key]
        stage = run_of["model"]["init_args"]["first_stage"]
        assert stage["class_path"].endswith(FirstStage.__name__)
        assert stage["init_args"] == encode["first_stage"]
