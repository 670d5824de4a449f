"""Full-size networks against the official state dicts, on the meta device."""

import json
from pathlib import Path

import pytest
import torch

from ant_lightning import (
    adm_imagenet64,
    adm_imagenet256,
    adm_p2_light,
    dit_b_2,
    dit_l_2,
    dit_s_2,
    dit_xl_2,
    ldm_cin256,
    ldm_ffhq256,
)

MANIFESTS = Path(__file__).parents[1] / "golden" / "A_manifests"

BUILDERS = {
    "dit_s_2": dit_s_2,
    "dit_b_2": dit_b_2,
    "dit_l_2": dit_l_2,
    "dit_xl_2": dit_xl_2,
    "dit_s_2_ant_imagenet": dit_s_2,
    "dit_s_2_ant_unconditional": lambda: dit_s_2(num_classes=1),
    "adm_imagenet256_uncond": adm_imagenet256,
    "adm_imagenet64_cond": adm_imagenet64,
    "adm_p2_ffhq256_light": adm_p2_light,
    "ldm_ffhq256": ldm_ffhq256,
    "ldm_celeba256": ldm_ffhq256,
    "ldm_cin256_v2": lambda: ldm_cin256(num_classes=0),
}


def test_every_manifest_has_a_builder():
    assert sorted(BUILDERS) == sorted(path.stem for path in MANIFESTS.glob("*.json"))


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_names_order_shapes_and_totals_equal_the_official_ones(name):
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    with torch.device("meta"):
        model = BUILDERS[name]()
    entries = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    assert entries == list(manifest["state_dict"].items())
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == manifest["total_params"]
    frozen = [key for key, p in parameters.items() if not p.requires_grad]
    assert frozen == manifest["frozen_parameters"]
    trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
    assert trainable == manifest["trainable_params"]


def test_the_class_conditional_ldm_adds_only_its_class_table():
    manifest = json.loads((MANIFESTS / "ldm_cin256_v2.json").read_text())
    with torch.device("meta"):
        model = ldm_cin256()
    entries = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    table = ("class_embedder.embedding.weight", [1001, 512])
    assert entries == [*manifest["state_dict"].items(), table]
    assert model.null_class == 1000
