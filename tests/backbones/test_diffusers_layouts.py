"""Names, configurations and operations between our networks and those of diffusers."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from ant_lightning import ConfigError, DiT, UNet
from ant_lightning.backbones.diffusers_layouts import diffusers_layout

GOLDEN = Path(__file__).parents[1] / "golden" / "M_diffusers"
CASES = sorted(path.stem for path in GOLDEN.glob("map_*.json"))


def network(case):
    info = json.loads((GOLDEN / f"{case}.json").read_text())
    kind = DiT if "patch_size" in info["official_config"] else UNet
    torch.manual_seed(0)
    ours = kind(**info["official_config"]).double()
    for parameter in ours.parameters():
        if parameter.requires_grad:  # not the positions of a DiT
            torch.nn.init.normal_(parameter, std=0.2)
    return ours.eval(), info


@pytest.mark.parametrize("case", CASES)
def test_names_operations_and_configuration_are_the_verified_ones(case):
    ours, info = network(case)
    layout = diffusers_layout(ours)
    name = info.get("diffusers_class", "DiTTransformer2DModel")
    assert layout.class_name == name
    assert layout.config == info["diffusers_config"]
    assert sorted(layout.rows) == sorted(tuple(row) for row in info["rows"])


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_equal_and_the_way_back_is_exact(case):
    ours, _ = network(case)
    layout = diffusers_layout(ours)
    own = ours.state_dict()
    theirs = getattr(diffusers, layout.class_name)(**layout.config).double().eval()
    made = layout.to_diffusers(own)
    theirs.load_state_dict(made)
    arrays = np.load(GOLDEN / f"{case}.npz")
    x = torch.from_numpy(arrays["in/x"]).double()
    t = torch.from_numpy(arrays["in/t"])
    y = torch.from_numpy(arrays["in/y"]) if "in/y" in arrays else None
    extra = {}
    if layout.class_name == "DiTTransformer2DModel":
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        extra = {"class_labels": torch.zeros_like(t) if y is None else y}
    elif layout.class_name == "UNet2DConditionModel":
        extra = {"encoder_hidden_states": ours.class_embedder["embedding"](y)[:, None]}
    elif y is not None:
        extra = {"class_labels": y}
    with torch.no_grad():
        expected, output = ours(x, t, y), theirs(x, t, **extra).sample
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=0)
    back = layout.from_diffusers(made, {name: value.shape for name, value in own.items()})
    missing = set(own) - set(back)
    assert missing <= {"pos_embed", "class_embedder.embedding.weight"}
    for each, value in back.items():
        torch.testing.assert_close(value, own[each], atol=0, rtol=0)


def test_what_has_no_equivalent_is_refused_with_the_reason():
    sizes = {"input_size": 8, "num_res_blocks": 1, "model_channels": 64}
    with pytest.raises(ConfigError, match=r"channel_mult: must begin with 1, 2 or 4, .*found 0.5"):
        diffusers_layout(UNet(**sizes, channel_mult=[0.5, 1]))
    heads = {"channel_mult": [1, 2], "attention_resolutions": [1, 2], "num_heads": 4}
    with pytest.raises(ConfigError, match=r"num_heads: .*found heads of 16, 32 channels"):
        diffusers_layout(UNet(**sizes, **heads))
    with pytest.raises(ConfigError, match=r"mlp_ratio: must be 4, .*found 2.0"):
        diffusers_layout(DiT(input_size=4, hidden_size=8, depth=1, num_heads=1, mlp_ratio=2))
    with pytest.raises(ConfigError, match=r"must be a DiT or a UNet .*found Linear"):
        diffusers_layout(torch.nn.Linear(1, 1))


def test_a_constant_that_differs_is_not_dropped():
    ours, _ = network("map_adm_no_conv_resample")
    layout = diffusers_layout(ours)
    made = layout.to_diffusers(ours.state_dict())
    made["up_blocks.0.upsamplers.0.conv.weight"] = torch.randn(64, 64, 3, 3)
    with pytest.raises(ConfigError, match=r"must be the constant identity_kernel"):
        layout.from_diffusers(made, {n: v.shape for n, v in ours.state_dict().items()})
