"""Schedules, tables and timestep spacings against the official ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from spacings import spaced

from ant_lightning import (
    DDIM,
    ConfigError,
    CosineSchedule,
    DiscreteDiffusion,
    LinearSchedule,
    ScaledLinearSchedule,
)
from ant_lightning.diffusion.samplers.spacing import latent_ddim_timesteps

GOLDEN = Path(__file__).parents[1] / "golden" / "C_diffusion"
SCHEDULES = {"linear": LinearSchedule, "cosine": CosineSchedule}
SPACINGS = json.loads((GOLDEN / "space_timesteps.json").read_text())["cases"]
LATENT = json.loads((GOLDEN / "ldm_schedule_0.0015_0.0195.json").read_text())


def assert_close(found, wanted, *, rtol=1e-10, atol=1e-14):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("total", [100, 1000])
def test_tables_are_the_official_ones(name, total):
    golden = np.load(GOLDEN / f"schedule_{name}_T{total}.npz")
    process = DiscreteDiffusion(SCHEDULES[name](num_timesteps=total))
    tables = process.tables(torch.device("cpu"))
    compared = 0
    for key, wanted in golden.items():
        if hasattr(tables, key):
            assert getattr(tables, key).dtype == torch.float64
            assert_close(getattr(tables, key), wanted)
            compared += 1
    assert compared >= 10
    assert_close(process.snr, golden["snr"])
    assert_close(process.log_snr, golden["log_snr"], atol=1e-12)


def test_coefficients_that_are_not_stored_follow_from_those_that_are():
    golden = np.load(GOLDEN / "schedule_linear_T1000.npz")
    process = DiscreteDiffusion(LinearSchedule())
    t = torch.arange(1000)
    x_t = torch.linspace(-2, 2, 1000, dtype=torch.float64)[:, None]
    eps = torch.sin(x_t * 3)
    wanted = (
        golden["sqrt_recip_alphas_cumprod"][:, None] * x_t.numpy()
        - golden["sqrt_recipm1_alphas_cumprod"][:, None] * eps.numpy()
    )
    assert_close(process.to_x_start(eps, x_t, t), wanted, rtol=1e-9, atol=1e-10)
    log_noise = 2 * process.tables(torch.device("cpu")).sqrt_one_minus_alphas_cumprod.log()
    assert_close(log_noise, golden["log_one_minus_alphas_cumprod"])


def test_latent_diffusion_tables():
    golden = np.load(GOLDEN / "ldm_schedule_0.0015_0.0195.npz")
    process = DiscreteDiffusion(ScaledLinearSchedule())
    tables = process.tables(torch.device("cpu"))
    for key in ("betas", "alphas_cumprod", "posterior_variance", "posterior_mean_coef1"):
        assert_close(getattr(tables, key), golden[key])
    assert_close(tables.posterior_mean_coef2, golden["posterior_mean_coef2"])
    assert_close(process.snr, golden["snr"])
    assert_close(process.log_snr, golden["log_snr"], atol=1e-12)
    # Only entry 0 of the log-variance differs: guided diffusion repeats entry 1 there.
    assert_close(
        tables.posterior_log_variance_clipped[1:], golden["posterior_log_variance_clipped"][1:]
    )


@pytest.mark.parametrize("case", LATENT["ddim"], ids=lambda case: f"{case['method']}-{case['S']}")
def test_latent_diffusion_ddim_timesteps(case):
    process = DiscreteDiffusion(ScaledLinearSchedule())
    if "raises" in case:
        with pytest.raises(ConfigError, match=r"num_steps: .* found 1000"):
            latent_ddim_timesteps(1000, case["S"])
        return
    quadratic = case["method"] == "quad"
    sampler = DDIM(case["S"], eta=case["eta"], spacing="ldm_quadratic" if quadratic else "ldm")
    # The quadratic spacing has a timestep twice: a step from there to itself, which we leave out.
    timesteps, kept = np.unique(case["timesteps"], return_index=True)
    assert latent_ddim_timesteps(1000, case["S"], quadratic=quadratic) == timesteps.tolist()
    assert len(timesteps) == len(case["timesteps"]) - quadratic
    assert sampler.num_calls(process) == len(timesteps)
    path = sampler.respaced(process)
    assert path.timestep_map.tolist() == [0, *timesteps]
    golden = {
        name: np.load(GOLDEN / "ldm_schedule_0.0015_0.0195.npz")[f"{case['key']}/{name}"][kept]
        for name in ("alphas", "alphas_prev", "sigmas")
    }
    assert_close(path.alphas_cumprod[1:], golden["alphas"])
    assert_close(path.alphas_cumprod[:-1], golden["alphas_prev"])
    sigma = case["eta"] * path.tables(torch.device("cpu")).posterior_variance[1:].sqrt()
    assert_close(sigma, golden["sigmas"], rtol=1e-9)


@pytest.mark.parametrize("case", SPACINGS, ids=lambda case: str(case["section_counts"]))
def test_space_timesteps(case):
    if "raises" in case:
        with pytest.raises(ConfigError, match="timesteps"):
            spaced(case["num_timesteps"], case["section_counts"])
    else:
        found = spaced(case["num_timesteps"], case["section_counts"])
        assert found == case["result_sorted"]


def test_defaults_of_create_diffusion():
    golden = json.loads((GOLDEN / "create_diffusion_defaults.json").read_text())
    for repository, schedule in (
        ("facebookresearch/DiT", LinearSchedule()),
        ("gohyojun15/ANT_diffusion", CosineSchedule()),
    ):
        process = DiscreteDiffusion(schedule, variance_type="learned_range")
        assert process.num_timesteps == golden[repository]["num_timesteps"]
        for t, wanted in golden[repository]["alphas_cumprod_at"].items():
            assert float(process.alphas_cumprod[int(t)]) == pytest.approx(wanted, rel=1e-10)
