"""Outputs and gradients of small networks against the official implementations."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timestep_features
import torch

from ant_lightning import DiT, UNet

GOLDEN = Path(__file__).parents[1] / "golden" / "B_forward"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
FRACTIONAL = ("adm_legacy_order", "t_frac")
FILLS = {"fillA": (0.5, 0.1, 0.02, 0.0), "fillB": (1.5, 0.3, 0.2, 0.00123)}


def load(case):
    return json.loads((GOLDEN / f"{case}.json").read_text()), np.load(GOLDEN / f"{case}.npz")


def build(config):
    """The network of a case; official names that differ from ours are translated here."""
    if "patch_size" in config:
        return DiT(**config)
    ours = {key: value for key, value in config.items() if key != "num_heads_upsample"}
    ours["input_size"] = ours.pop("image_size")
    ours["num_classes"] = ours.get("num_classes") or 0
    return UNet(**ours)


def fill_(model, fill):
    """The deterministic weights of the golden data's README; DiT keeps its own positions."""
    scale, norm_scale, bias_scale, chirp = FILLS[fill]
    for name, entry in model.state_dict().items():
        if name == "pos_embed":
            continue
        index = np.arange(entry.numel(), dtype=np.float64)
        phase = zlib.crc32(name.encode()) % 10007
        base = np.sin(index * 0.731 + chirp * index * index + phase)
        if entry.ndim >= 2:
            value = scale / np.sqrt(np.prod(entry.shape[1:])) * base
        elif name.endswith("weight"):
            value = 1 + norm_scale * base
        else:
            value = bias_scale * base
        entry.copy_(torch.from_numpy(value.reshape(tuple(entry.shape)).astype(np.float32)))


def filled(case, fill, dtype=torch.float64):
    info, arrays = load(case)
    model = build(info["config"]).to(dtype).eval()
    fill_(model, fill)
    return model, info, arrays


def inputs(arrays, dtype, timesteps="t", labels="y"):
    def get(name):
        return torch.from_numpy(arrays[f"in/{name}"]) if f"in/{name}" in arrays else None

    extra = {} if get("context") is None else {"context": get("context").to(dtype)}
    return (get("x").to(dtype), get(timesteps), get(labels)), extra


# Float32 sinusoids move the outputs by up to 1.1e-5 from one CPU to the next. In float32 the
# tolerance allows for it; the float64 tests give the network the official sinusoids and then
# need no more than 1e-9.


@pytest.mark.parametrize(("case", "timesteps"), [*((c, "t") for c in CASES), FRACTIONAL])
def test_float32_outputs(case, timesteps):
    model, _, arrays = filled(case, "fillB", torch.float32)
    call = "forward" if timesteps == "t" else "forward_fractional_t"
    args, extra = inputs(arrays, torch.float32, timesteps)
    with torch.no_grad():
        output = model(*args, **extra).numpy()
    np.testing.assert_allclose(output, arrays[f"fillB/{call}/out64"], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fill", sorted(FILLS))
def test_float64_outputs_and_gradient_norms(case, fill):
    model, info, arrays = filled(case, fill)
    args, extra = inputs(arrays, torch.float64)
    timestep_features.official(model)
    output = model(*args, **extra)
    atol = 1e-9 if fill == "fillB" else 1e-6
    golden = arrays[f"{fill}/forward/out64"]
    np.testing.assert_allclose(output.detach().numpy(), golden, atol=atol, rtol=0)
    if fill == "fillA":
        # Rank-2 weights amplify rounding by up to 1e4: the norms say nothing more than fill B's.
        return
    output.square().mean().backward()
    reference = info["grad_l2_float64"][fill]["params"]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(trainable) == sorted(reference)
    for name, parameter in trainable.items():
        norm = parameter.grad.norm().item()
        assert norm == pytest.approx(reference[name], rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance_by_hand_equals_the_official_guided_forward(scale):
    model, _, arrays = filled("dit_h64_d2_p2", "fillB")
    (x, timesteps, labels), _ = inputs(arrays, torch.float64, "cfg_t", "cfg_y")
    timestep_features.official(model)
    half = len(x) // 2
    with torch.no_grad():
        output = model(torch.cat([x[:half], x[:half]]), timesteps, labels)
    conditional, unconditional = output[:half, :3], output[half:, :3]
    guided = unconditional + scale * (conditional - unconditional)
    # The official method guides three channels and hands the others through.
    expected = torch.cat([torch.cat([guided, guided]), output[:, 3:]], dim=1).numpy()
    golden = arrays[f"fillB/forward_with_cfg_{scale}/out64"]
    np.testing.assert_allclose(expected, golden, atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("dit")])
def test_fixed_positions_are_the_official_ones_to_the_last_bit(case):
    info, arrays = load(case)
    np.testing.assert_array_equal(build(info["config"]).pos_embed, arrays["pos_embed"])


@pytest.mark.parametrize("case", ["dit_h64_d2_p2", "adm_classcond", "ldm_spatial_transformer"])
def test_gradient_checkpointing_changes_no_gradient(case):
    model, _, arrays = filled(case, "fillB")
    args, extra = inputs(arrays, torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    saved = []

    def count(tensor):
        saved[-1] += tensor.numel()
        return tensor

    gradients = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(*args, **extra).square().mean()
        gradients.append(torch.autograd.grad(loss, parameters))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-14)
    assert saved[1] < 0.5 * saved[0]


@pytest.mark.parametrize("case", ["adm_updown_additive", "adm_conv_resample", "adm_classcond"])
def test_channels_last_gives_the_same_output_in_channels_last(case):
    info, arrays = load(case)
    model = build({**info["config"], "channels_last": True}).double().eval()
    fill_(model, "fillB")
    args, _ = inputs(arrays, torch.float64)
    timestep_features.official(model)
    with torch.no_grad():
        output = model(*args)
    assert output.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(output, arrays["fillB/forward/out64"], atol=1e-9, rtol=0)
