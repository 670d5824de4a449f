"""Every config of flow matching and EDM at scale: its size, and two steps at reduced width."""

from importlib import import_module
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from first_stages import save_first_stages
from jsonargparse import ArgumentParser

from ant_lightning import ShapesData

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OTHERS = ("FlowMatching", "EDM")


def found():
    for path in sorted(CONFIGS.glob("*/*.yaml")):
        if not any(name in (text := path.read_text()) for name in OTHERS):
            continue
        model = yaml.safe_load(text).get("model") or {}
        process = model.get("init_args", {}).get("process", {}).get("class_path", "")
        elsewhere = path.parent.name in {"digits", "folder"}  # test_folder_configs
        if process.rpartition(".")[2] in OTHERS and not elsewhere:
            yield f"{path.parent.name}/{path.stem}"


NAMES = list(found())
# Millions of parameters: SiT's are those of DiT; EDM's ADM has 296, its DDPM++ 56.
MILLIONS = {
    "cifar10/edm": 59,
    "imagenet/edm2_64": 296,
    "imagenet/edm_64": 296,
    "imagenet/sit_b2": 131,
    "imagenet/sit_xl2": 675,
    "imagenet/sit_xl2_logit_normal": 675,
}
UNET = {
    "class_path": "ant_lightning.UNet",
    "init_args": {
        "input_size": 8,
        "out_channels": 3,
        "model_channels": 32,
        "channel_mult": [1],
        "num_res_blocks": 1,
    },
}
DIT = {
    "class_path": "ant_lightning.DiT",
    "init_args": {
        "input_size": 8,
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 3,
    },
}


@pytest.fixture(scope="module")
def first_stages(tmp_path_factory):
    return save_first_stages(tmp_path_factory.mktemp("first_stages"))


def settings_of(name, first_stages, balancer=None, *, small=False):
    model = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    init = model["init_args"]
    if "first_stage" in init:
        init["first_stage"]["init_args"]["source"] = str(first_stages / "kl")
    if small:
        init["backbone"] = DIT if "sit" in name else UNET
    if balancer:
        tasks = yaml.safe_load((CONFIGS / f"balancer/{balancer}.yaml").read_text())["model"]
        init["tasks"] |= tasks["init_args"]["tasks"]
    if "balancer" in init["tasks"]:  # the command line takes it from the clustering
        init["tasks"]["balancer"].setdefault("init_args", {})["num_tasks"] = 5
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model")
    return parser, parser.parse_object({"model": model})


def test_all_of_them_are_here():
    assert sorted(MILLIONS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_network_has_its_size(name, first_stages):
    _, settings = settings_of(name, first_stages)
    backbone = settings.model.init_args.backbone
    package, _, function = backbone.class_path.rpartition(".")
    with torch.device("meta"):
        network = getattr(import_module(package), function)(**backbone.init_args.as_dict())
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert round(millions) == MILLIONS[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("balancer", ["uw", "pcgrad"])
def test_two_steps_at_reduced_width(name, balancer, first_stages, tmp_path):
    parser, settings = settings_of(name, first_stages, balancer, small=True)
    module = parser.instantiate_classes(settings).model
    before = {key: value.clone() for key, value in module.backbone.state_dict().items()}
    size = 16 if "sit" in name else 8
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
    data = ShapesData(image_size=size, num_images=20, num_held_out=2, num_classes=3, batch_size=5)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    assert module.num_skipped_steps == 0
    after = module.backbone.state_dict()
    # At least the last layer: the output starts at 0, and EDM2's first step has rate 0.
    assert sum(not torch.equal(before[key], after[key]) for key in before) >= 2


def test_edm2_has_its_averages_and_its_learning_rate(first_stages):
    config = yaml.safe_load((CONFIGS / "imagenet/edm2_64.yaml").read_text())
    assert config["ema"]["lengths"] == [0.05, 0.1]
    parser, settings = settings_of("imagenet/edm2_64", first_stages, small=True)
    module = parser.instantiate_classes(settings).model
    optimizer, _ = module.optimizer_factory.make([{"params": [torch.zeros(1)]}])
    scheduler = module.optimization.lr_scheduler(optimizer)
    # Equation 67 at half the warm-up of 10 million images, at its end, and far beyond.
    batch = config["data"]["init_args"]["batch_size"]
    steps = (5e6 / batch, 1e7 / batch, 4 * 70000)
    assert [scheduler.factor(n) for n in steps] == pytest.approx([0.5, 1.0, 0.5])


def test_the_configs_of_cifar_10_read_the_same_files():
    data = [
        yaml.safe_load((CONFIGS / f"cifar10/{name}.yaml").read_text())["data"]
        for name in ("edm", "adm", "dit")
    ]
    for each in data:
        del each["init_args"]["batch_size"]
    assert data[0] == data[1] == data[2]
