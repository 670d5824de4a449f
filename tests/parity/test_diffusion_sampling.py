"""Single steps and whole loops of DDPM and DDIM against the official ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from spacings import spaced

from ant_lightning import (
    DDIM,
    DDPM,
    CosineSchedule,
    DiscreteDiffusion,
    LinearSchedule,
    ScaledLinearSchedule,
)
from ant_lightning.diffusion.samplers.ddim import ancestral_step, ddim_inverse_step, ddim_step

GOLDEN = Path(__file__).parents[1] / "golden" / "C_diffusion"
SCHEDULES = {"linear": LinearSchedule, "cosine": CosineSchedule}


def load(name):
    return json.loads((GOLDEN / f"{name}.json").read_text()), np.load(GOLDEN / f"{name}.npz")


def all_steps(process, golden, facts, *, dtype, clip):
    x, noise, output = (
        torch.from_numpy(golden[key]).to(dtype) for key in ("x", "noise", "model_output")
    )
    t = torch.from_numpy(golden["t"])
    output = output[:, : process.output_channels(3)]
    model = process.p_mean_variance(output, x, t, clip_denoised=clip)
    found = {
        "p_mean_variance/mean": model.mean,
        "p_mean_variance/variance": model.variance,
        "p_mean_variance/log_variance": model.log_variance,
        "p_mean_variance/pred_xstart": model.x_start,
        "p_sample": ancestral_step(model, t, noise),
        "ddim_reverse": ddim_inverse_step(process, model, t),
    }
    for eta in facts["etas"]:
        found[f"ddim_eta{eta:g}"] = ddim_step(process, model, t, eta=eta, noise=noise)
    return found


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "noclip"])
@pytest.mark.parametrize("combo", range(4))
@pytest.mark.parametrize("name", ["steps_linear_T1000", "steps_cosine_T1000_respaced50"])
def test_single_steps(name, combo, clip):
    facts, golden = load(name)
    mean, var = facts["combos"][combo]
    process = DiscreteDiffusion(
        SCHEDULES[facts["schedule"]](), prediction_type=mean, variance_type=var
    )
    if facts["respacing"]:
        process = process.respace(spaced(1000, facts["respacing"]))
    prefix = f"{mean}_{var}/{'clip' if clip else 'noclip'}/"
    exact = all_steps(process, golden, facts, dtype=torch.float64, clip=clip)
    single = all_steps(process, golden, facts, dtype=torch.float32, clip=clip)
    wanted = {key.removeprefix(prefix) for key in golden if key.startswith(prefix)}
    assert wanted == set(exact)
    for key in wanted:
        reference = golden[prefix + key]
        np.testing.assert_allclose(exact[key], reference, rtol=1e-9, atol=1e-10, err_msg=key)
        assert single[key].dtype == torch.float32
        # An entry of 0 in the file says that float32 was exact there; ours may round elsewhere.
        tolerance = max(3 * facts["max_abs_err_32_vs_64"][prefix + key], 1e-7)
        np.testing.assert_allclose(single[key], reference, rtol=0, atol=tolerance, err_msg=key)


def stub(facts, process):
    seen = []

    def denoiser(x, t):
        assert t.dtype == torch.int64
        seen.append(int(t[0]))
        eps = facts["a"] * x + facts["b"] * t.to(x.dtype).view(-1, 1, 1, 1) / 1000
        if process.variance_type == "learned_range":
            return torch.cat([eps, facts["va"] * x + facts["vb"]], dim=1)
        return eps

    return denoiser, seen


def run(sampler, process, facts, golden, *, dtype, clip):
    """Walk the path with the stored noise; give the states and the x_start predictions."""
    queue = iter(torch.from_numpy(golden["noise"]).to(dtype))
    drawn = []

    def noise():
        drawn.append(next(queue))
        return drawn[-1]

    denoiser, seen = stub(facts["stub"], process)
    x_T = torch.from_numpy(golden["x_T"]).to(dtype)
    steps = list(sampler.trajectory(process, denoiser, x_T, noise=noise, clip_denoised=clip))
    assert [step.timestep for step in steps] == seen
    assert [step.index for step in steps] == list(range(sampler.num_calls(process)))
    states = torch.stack([step.x for step in steps])
    return states, torch.stack([step.x_start for step in steps]), seen, len(drawn)


@pytest.mark.parametrize("name", ["loop_linear_T1000_10steps", "loop_linear_T1000_ddim10"])
def test_whole_loops(name):
    facts, golden = load(name)
    spacing = "ddim" if facts["respacing"].startswith("ddim") else "even"
    samplers = {
        "ancestral": (DDPM(10, spacing=spacing), 9),
        "ddim_eta0": (DDIM(10, spacing=spacing), 0),
        "ddim_eta1": (DDIM(10, eta=1.0, spacing=spacing), 9),
    }
    cases = [key.removesuffix("/x") for key in golden if key.endswith("/x")]
    assert len(cases) >= 4
    for case in cases:
        method = next(key for key in samplers if case.startswith(key))
        sampler, num_draws = samplers[method]
        process = DiscreteDiffusion(LinearSchedule(), variance_type=case.removeprefix(f"{method}_"))
        for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
            x, x_start, seen, drawn = run(sampler, process, facts, golden, dtype=dtype, clip=True)
            assert seen == golden["timestep_map"][::-1].tolist()
            # The official loop also draws for its last step, and multiplies by zero.
            assert drawn == num_draws
            np.testing.assert_allclose(x, golden[f"{case}/x"], rtol=0, atol=atol)
            wanted = golden[f"{case}/pred_xstart"]
            np.testing.assert_allclose(x_start, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["ldm_ddim_S10_eta0", "ldm_ddim_S10_eta1"])
def test_latent_diffusion_ddim_loop(name):
    facts, golden = load(name)
    process = DiscreteDiffusion(ScaledLinearSchedule())
    sampler = DDIM(facts["S"], eta=facts["eta"], spacing="ldm")
    x, x_start, seen, drawn = run(sampler, process, facts, golden, dtype=torch.float32, clip=False)
    assert seen == golden["timesteps_seen"].tolist()
    assert drawn == (10 if facts["eta"] else 0)
    np.testing.assert_allclose(x, golden["x"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(x_start, golden["pred_x0"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_latent_diffusion_quadratic_loop(eta):
    """The official loop, with the timestep that it has twice, in float64."""
    process = DiscreteDiffusion(ScaledLinearSchedule())
    abar = process.alphas_cumprod.numpy()
    facts, golden = load("ldm_ddim_S10_eta0")
    timesteps = (np.linspace(0, np.sqrt(1000 * 0.8), 50) ** 2).astype(int) + 1
    assert timesteps[:3].tolist() == [1, 1, 2]
    draws = np.random.default_rng(0).normal(size=(50, *golden["x_T"].shape))
    x = golden["x_T"].astype(np.float64)
    for i in range(49, -1, -1):
        a, previous = abar[timesteps[i]], abar[timesteps[i - 1] if i else 0]
        sigma = eta * np.sqrt((1 - previous) / (1 - a) * (1 - a / previous))
        eps = facts["stub"]["a"] * x + facts["stub"]["b"] * timesteps[i] / 1000
        x_start = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        direction = np.sqrt(1 - previous - sigma**2) * eps
        x = np.sqrt(previous) * x_start + direction + sigma * draws[i]
    kept = np.unique(timesteps, return_index=True)[1][::-1]
    given = {"x_T": golden["x_T"], "noise": draws[kept]}
    sampler = DDIM(50, eta=eta, spacing="ldm_quadratic")
    states, _, seen, drawn = run(sampler, process, facts, given, dtype=torch.float64, clip=False)
    assert seen == sorted(set(timesteps.tolist()), reverse=True)
    assert drawn == (49 if eta else 0)
    np.testing.assert_allclose(states[-1], x, rtol=1e-10, atol=1e-10)
