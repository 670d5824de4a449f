"""SiT's checkpoints in its own layout: velocity, time and sign; other files are refused."""

import argparse
import re

import pytest
import torch
from torch.nn import functional as F

from ant_lightning import (
    EDM,
    ConfigError,
    DiscreteDiffusion,
    DiT,
    DiTModule,
    FlowMatching,
    ODESampler,
    Sampling,
    SNRClustering,
    Tasks,
)
from ant_lightning.models.state import process_summary

SIZE = {"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 16, "num_heads": 2}
FILES = {
    "SiT": {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"},
    "DiT": {"model": "DiT-XL/2", "num_classes": 1000},
}


def network(learn_sigma=True):
    return DiT(**SIZE, depth=2, num_classes=3, learn_sigma=learn_sigma)


def official(seed=0):
    """A state dict with the names and shapes of SiT's, which are DiT's; float64."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in network().state_dict().items()
    }


def sit(w, x, t, y):
    """SiT's forward pass, written out: the velocity towards the data at its time, 1 for data."""

    def linear(name, value):
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def modulated(value, shift, scale):
        normed = F.layer_norm(value, value.shape[-1:], eps=1e-6)
        return normed * (1 + scale[:, None]) + shift[:, None]

    tokens = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2)
    tokens = tokens.flatten(2).mT + w["pos_embed"]
    # The network is given t in [0, 1] itself, not 1000 t; sinusoids of 256 numbers.
    angles = t[:, None] * 10000 ** (-torch.arange(128, dtype=t.dtype) / 128)
    c = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))
    c = linear("t_embedder.mlp.2", F.silu(c)) + w["y_embedder.embedding_table.weight"][y]
    for block in ("blocks.0", "blocks.1"):
        shift, scale, gate, shift2, scale2, gate2 = linear(
            f"{block}.adaLN_modulation.1", F.silu(c)
        ).chunk(6, 1)
        qkv = linear(f"{block}.attn.qkv", modulated(tokens, shift, scale))
        q, k, v = qkv.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)  # [b, heads, n, 8] each
        attention = torch.softmax(q @ k.mT / 8**0.5, -1) @ v
        attention = linear(f"{block}.attn.proj", attention.transpose(1, 2).flatten(2))
        tokens = tokens + gate[:, None] * attention
        mlp = linear(f"{block}.mlp.fc1", modulated(tokens, shift2, scale2))
        mlp = linear(f"{block}.mlp.fc2", F.gelu(mlp, approximate="tanh"))
        tokens = tokens + gate2[:, None] * mlp
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, 1)
    patches = linear("final_layer.linear", modulated(tokens, shift, scale))
    grid = patches.unflatten(1, (2, 2)).unflatten(-1, (2, 2, 4))  # [b, h, w, p, q, c]
    images = grid.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 4, 4, 4)
    return images[:, :2]  # `learn_sigma`: SiT drops the second half


def module(path, process=None, **settings):
    torch.manual_seed(1)
    process = process or FlowMatching()
    return DiTModule(
        network(learn_sigma=4 in process.accepted_channels(2)),
        process=process,
        tasks=Tasks(SNRClustering(num_tasks=2)),
        init_from=str(path),
        seed=0,
        **settings,
    )


@pytest.mark.parametrize("layout", ["bare", "training file"])
def test_the_velocity_is_that_of_sit(layout, tmp_path, capsys):
    weights, path = official(), tmp_path / "sit.pt"
    args = argparse.Namespace(**FILES["SiT"])
    content = {"model": official(1), "ema": weights, "opt": {"state": {}}, "args": args}
    torch.save(weights if layout == "bare" else content, path)
    # In float64: float32 sinusoids differ between CPUs.
    model = module(path, sampling=Sampling(ODESampler(num_steps=4, method="euler"))).double()
    model.backbone.load_state_dict(weights)
    capsys.readouterr()
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0])  # 3 is the null class
    t = torch.tensor([0.0, 0.125, 0.5, 0.75, 1.0], dtype=torch.float64)  # exact in float32
    wanted = sit(weights, x, t, labels)
    output = model.denoise(x, 1 - t, labels)
    assert output.shape[1] == 4
    prediction, rest = model.process.split_output(output, 2)
    assert rest is None
    # The sinusoids are computed in float32.
    torch.testing.assert_close(model.process.to_v(prediction, x, 1 - t), -wanted, rtol=0, atol=5e-5)
    assert float(wanted.abs().max()) > 0.1
    # The Euler steps of SiT, from noise at t = 0 to data at t = 1.
    state = noise = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    for step in range(4):
        state = state + sit(weights, state, torch.full((2,), step / 4).double(), labels[:2]) / 4
    found = model.sampler.sample(
        model.process,
        model.guided(range(2), labels=labels[:2], guidance_scale=1.0),
        noise,
        clip_denoised=False,
    )
    torch.testing.assert_close(found, state, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("kind", "args", "process", "message"),
    [
        ("SiT", {}, EDM(), r"run \(EDM.*found a network for FlowMatching\(path=linear"),
        ("SiT", {}, DiscreteDiffusion(variance_type="learned_range"), "found a network for FlowM"),
        ("SiT", {"path_type": "GVP"}, FlowMatching(), r"path=linear.*found .*path=gvp"),
        ("SiT", {"prediction": "noise"}, FlowMatching(), r", v\), found .*, eps"),
        ("SiT", {}, FlowMatching(convention="diffusers"), "convention=diffusers.*convention=sit"),
        ("DiT", {}, FlowMatching(), "found a network for DiscreteDiffusion"),
        ("SiT", {"path_type": "GVP"}, FlowMatching("gvp"), None),
        ("DiT", {}, DiscreteDiffusion(variance_type="learned_range"), None),
    ],
)
def test_a_file_of_another_process_or_convention_is_refused(kind, args, process, message, tmp_path):
    path = tmp_path / "file.pt"
    stored = argparse.Namespace(**(FILES[kind] | args))
    torch.save({"model": official(), "ema": official(), "args": stored}, path)
    if message is None:
        module(path, process)
        return
    for settings in ({}, {"sampling": Sampling(guide_checkpoint=str(path), guidance_scale=2.0)}):
        with pytest.raises(ConfigError, match=message) as found:
            module(path, process, **settings)
        assert "\n" not in str(found.value)
        assert str(found.value).startswith("sampling.guide" if settings else "init_from: ")


def test_our_own_checkpoints_say_their_process_too(tmp_path):
    state = {f"backbone.{name}": value for name, value in official().items()}
    for process in (FlowMatching("gvp"), FlowMatching(convention="diffusers"), DiscreteDiffusion()):
        own = {"process": process_summary(process), "prediction_type": process.prediction_type}
        torch.save({"state_dict": state, "ant_lightning": own}, tmp_path / "own.pt")
        with pytest.raises(ConfigError, match=rf"for {re.escape(own['process'])}, "):
            module(tmp_path / "own.pt", init_weights="model")
    own = {"process": process_summary(FlowMatching()), "prediction_type": "v"}
    torch.save({"state_dict": state, "ant_lightning": own}, tmp_path / "own.pt")
    module(tmp_path / "own.pt", init_weights="model")
