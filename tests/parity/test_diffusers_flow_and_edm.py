"""Schedules and trajectories of diffusers' schedulers for flow matching and EDM."""

import math

import diffusers
import numpy as np
import pytest
import torch
from stand_in_network import load, stand_in, state_errors

from ant_lightning import EDM, DiffusersSampler, EDMPreconditioning, FlowMatching, ODESampler
from ant_lightning.diffusion.samplers.flow_times import flux_mu

SCHEDULES, SCHEDULE_ARRAYS = load("L_density/schedules")
RUNS, RUN_ARRAYS = load("L_density/trajectories")
OPTIONS = ("shift", "shift_terminal", "time_shift_type", "invert_sigmas")


def scheduler_of(name, facts):
    """The scheduler of one case."""
    settings = {key: facts[key] for key in facts if key in OPTIONS or key.startswith("use_")}
    if "mu" in facts:
        settings["use_dynamic_shifting"] = True
    if name.startswith("edm"):
        kept = ("sigma_max", "sigma_min", "rho", "sigma_data", "sigma_schedule")
        settings = {key: facts[key] for key in kept if key in facts}
        if name == "edm_exponential":
            settings["sigma_schedule"] = "exponential"
        return diffusers.EDMEulerScheduler(**settings)
    if name == "heun":
        return diffusers.FlowMatchHeunDiscreteScheduler(**settings)
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def sampled(scheduler, **settings):
    """Our sampler of a scheduler and the process it is for; sigma_data belongs to the process."""
    if isinstance(scheduler, diffusers.EDMEulerScheduler):
        process = EDM(EDMPreconditioning(scheduler.config.sigma_data))
        scheduler = type(scheduler).from_config(scheduler.config, sigma_data=0.5)
    else:
        process = FlowMatching(convention="diffusers")
    return DiffusersSampler(scheduler, **settings), process


@pytest.mark.parametrize(
    "name", [name for name in SCHEDULES["cases"] if not name.startswith(("table", "option_inv"))]
)
def test_schedules(name):
    """The noise levels at which our sampler calls the network."""
    facts = SCHEDULES["cases"][name]
    sampler, process = sampled(
        scheduler_of(name, facts),
        num_steps=facts.get("num_inference_steps"),
        sigmas=facts.get("sigmas"),
        mu=facts.get("mu"),
    )
    told = []

    def denoiser(x, times):
        told.append(float(process.network_inputs(x, times)[1][0]))
        return torch.zeros_like(x)

    x = torch.zeros(1, 1, 2, 2)
    steps = list(sampler.trajectory(process, denoiser, x, clip_denoised=False))
    sigmas, timesteps = (SCHEDULE_ARRAYS[f"{name}/{key}"] for key in ("sigmas", "timesteps"))
    np.testing.assert_allclose([step.timestep for step in steps], sigmas[:-1], rtol=2e-6)
    np.testing.assert_allclose(told, timesteps, rtol=2e-6, atol=2e-6)
    if "init_noise_sigma" in facts:
        assert sampler.scheduler.init_noise_sigma == pytest.approx(facts["init_noise_sigma"])


@pytest.mark.parametrize("shift", [1.0, 1.7, 3.0])
def test_tables_and_the_double_shift(shift):
    """The table is shifted once, and `set_timesteps` shifts its last entry again; we do not."""
    table = SCHEDULE_ARRAYS[f"table_shift{shift:g}/sigmas"]
    ours = ODESampler(1000, method="euler", shift=shift).path_times(FlowMatching())
    np.testing.assert_allclose(ours[:-1], table, rtol=2e-6)
    np.testing.assert_allclose(1000 * table, SCHEDULE_ARRAYS[f"table_shift{shift:g}/timesteps"])
    last = SCHEDULE_ARRAYS[f"shift{shift:g}_N10/sigmas"][-2]
    once = table[-1]
    assert last == pytest.approx(shift * once / (1 + (shift - 1) * once), rel=2e-6)


def test_an_inverted_schedule_is_refused():
    facts = SCHEDULES["cases"]["option_inverted"]
    scheduler = scheduler_of("option_inverted", {**facts, "invert_sigmas": True})
    scheduler.set_timesteps(facts["num_inference_steps"])
    np.testing.assert_allclose(scheduler.sigmas, SCHEDULE_ARRAYS["option_inverted/sigmas"])
    with pytest.raises(ValueError, match="invert_sigmas comes from the diffusion process"):
        DiffusersSampler(scheduler)


def test_shift_by_resolution_of_flux():
    tokens, wanted = (SCHEDULE_ARRAYS[f"calculate_shift/{key}"] for key in ("image_seq_len", "mu"))
    np.testing.assert_allclose([flux_mu(int(num)) for num in tokens], wanted, rtol=1e-12)
    for mu in (0.5, 0.83, 1.15):  # a static shift of exp(mu)
        table = SCHEDULE_ARRAYS[f"dynamic_exponential_mu{mu:g}_given_sigmas/sigmas"]
        times = ODESampler(10, shift=math.exp(mu)).path_times(FlowMatching())
        np.testing.assert_allclose(times, table, rtol=2e-6)


@pytest.mark.parametrize("name", [name for name in RUNS["cases"] if name != "scale_noise"])
def test_trajectories(name):
    facts = RUNS["cases"][name]
    scheduler = scheduler_of(name, {**facts["config"], **({"mu": 1} if facts.get("mu") else {})})
    if facts["config"].get("stochastic_sampling"):
        scheduler = type(scheduler).from_config(scheduler.config, stochastic_sampling=True)
    sampler, process = sampled(
        scheduler, num_steps=facts["num_inference_steps"], mu=facts.get("mu")
    )
    network, labels = stand_in(RUNS["stand_in"]), torch.from_numpy(RUN_ARRAYS["y"])

    def denoiser(x, times):
        if isinstance(process, EDM):
            return network(*process.network_inputs(x, times), labels)
        return network(x, times, labels)  # v of timestep / 1000

    steps = list(
        sampler.trajectory(
            process,
            denoiser,
            torch.from_numpy(RUN_ARRAYS["x"]),
            noise=iter(torch.from_numpy(RUN_ARRAYS["noise"])).__next__,
            clip_denoised=False,
        )
    )
    assert len(steps) == sampler.num_calls(process)
    found = [step.x for step in steps]
    assert {state.dtype for state in found} == {torch.float32}
    assert state_errors(found, RUN_ARRAYS[f"{name}/x"][1:]) < 1e-5
    if f"{name}/denoised" in RUN_ARRAYS:
        images = [step.x_start for step in steps]
        assert state_errors(images, RUN_ARRAYS[f"{name}/denoised"]) < 1e-5
    if f"{name}/x_exact" not in RUN_ARRAYS or sampler.is_random:
        return
    # The recursion in float64 is our Euler at the same noise levels.
    times = RUN_ARRAYS[f"{name}/sigmas"].astype(np.float64).tolist()
    exact = ODESampler(times=times, method="euler").trajectory(
        process, denoiser, torch.from_numpy(RUN_ARRAYS["x"]).double(), clip_denoised=False
    )
    assert state_errors([step.x for step in exact], RUN_ARRAYS[f"{name}/x_exact"][1:]) < 1e-10


def test_scale_noise_is_our_noising():
    facts = RUNS["cases"]["scale_noise"]
    assert facts["shift"] == 1.7
    x, noise = (torch.from_numpy(RUN_ARRAYS[key]) for key in ("x", "noise"))
    times = torch.from_numpy(RUN_ARRAYS["scale_noise/timesteps"]).double() / 1000
    found = FlowMatching().noised(x, noise[0], times)
    assert state_errors(found, RUN_ARRAYS["scale_noise/out"]) < 1e-5
