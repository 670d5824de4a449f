"""The adapter for diffusers' schedulers, on a network whose exact answer is known."""

import math

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from ant_lightning import (
    DDIM,
    ConfigError,
    CosineSchedule,
    DiffusersSampler,
    DiscreteDiffusion,
    LinearSchedule,
    Sampler,
)

MEAN, STD = 0.3, 0.5
KINDS = ["eps", "x0", "v"]


def gaussian_denoiser(process, *, calls=None):
    """The optimal network for pixels that are N(MEAN, STD²), in the type of the process."""

    def denoiser(x, t):
        assert t.dtype == torch.int64
        if calls is not None:
            calls.append(int(t[0]))
        abar = process.alphas_cumprod[t].view(-1, 1, 1, 1)
        a, s = abar.sqrt(), (1 - abar).sqrt()
        x_start = MEAN + a * STD**2 / (abar * STD**2 + 1 - abar) * (x - a * MEAN)
        eps = (x - a * x_start) / s
        output = {"eps": eps, "x0": x_start, "v": a * eps - s * x_start}[process.prediction_type]
        if process.variance_type == "learned_range":
            output = torch.cat([output, torch.full_like(output, math.nan)], dim=1)
        return output

    return denoiser


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gap(process, sampler, x_T, wanted):
    denoiser = gaussian_denoiser(process)
    return float((sampler.sample(process, denoiser, x_T, clip_denoised=False) - wanted).abs().max())


@pytest.mark.parametrize(
    ("kind", "variance_type"), [*((kind, "fixed_small") for kind in KINDS), ("v", "learned_range")]
)
def test_twenty_steps_agree_with_many_of_ddim(kind, variance_type):
    process = DiscreteDiffusion(CosineSchedule(), prediction_type=kind, variance_type=variance_type)
    x_T = normal(2, 1, 4, 4)
    many = DDIM(300, spacing="even").sample(
        process, gaussian_denoiser(process), x_T, clip_denoised=False
    )
    # First-order DDIM in 20 steps is ten times as far away.
    coarse = gap(process, DDIM(20), x_T, many)
    for scheduler in (DPMSolverMultistepScheduler(), UniPCMultistepScheduler()):
        sampler = DiffusersSampler(scheduler, num_steps=20)
        assert isinstance(sampler, Sampler)
        found = gap(process, sampler, x_T, many)
        assert found < 0.015
        assert found < coarse / 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_with_another_scale_of_x_agrees_as_well(kind):
    process = DiscreteDiffusion(LinearSchedule(), prediction_type=kind)
    x_T = normal(2, 1, 4, 4)
    abar = process.alphas_cumprod[-1]
    exact = MEAN + (x_T - abar.sqrt() * MEAN) * STD / (abar * STD**2 + 1 - abar).sqrt()
    gaps = [
        gap(process, DiffusersSampler(EulerDiscreteScheduler(), num_steps=n), x_T, exact)
        for n in (20, 80)
    ]
    assert gaps[1] < gaps[0] / 2.5
    assert gaps[1] < 0.1


def test_steps_tell_what_was_denoised_and_can_be_entered_in_the_middle():
    process = DiscreteDiffusion(LinearSchedule())
    calls = []
    denoiser = gaussian_denoiser(process, calls=calls)
    # Euler's own "linspace" timesteps lie between whole ones and are rounded.
    sampler = DiffusersSampler(EulerDiscreteScheduler(), num_steps=7)
    whole = list(sampler.trajectory(process, denoiser, normal(2, 1, 4, 4)))
    assert calls == [step.timestep for step in whole]
    assert calls == [999, 832, 666, 500, 333, 166, 0]
    assert [step.index for step in whole] == list(range(sampler.num_calls(process)))
    assert all(float(step.x_start.abs().max()) <= 1 for step in whole)
    late = sampler.sample(process, denoiser, whole[2].x, first_step=3)
    torch.testing.assert_close(late, whole[-1].x, rtol=0, atol=0)


def test_a_respaced_process_still_tells_original_timesteps():
    process = DiscreteDiffusion(LinearSchedule()).respace(range(0, 1000, 5))
    calls = []

    def denoiser(x, t):
        calls.append(int(t[0]))
        return torch.zeros_like(x)

    DiffusersSampler(UniPCMultistepScheduler(), num_steps=4).sample(
        process, denoiser, normal(1, 1, 2, 2)
    )
    assert calls[0] == 995
    assert all(t % 5 == 0 for t in calls)


def test_clipping_is_ours():
    process = DiscreteDiffusion(CosineSchedule(), prediction_type="v")
    denoiser = gaussian_denoiser(process)
    sampler = DiffusersSampler(DPMSolverMultistepScheduler())
    x_T = 3 * normal(2, 1, 4, 4)
    assert float(sampler.sample(process, denoiser, x_T).abs().max()) <= 1 + 1e-4
    assert float(sampler.sample(process, denoiser, x_T, clip_denoised=False).abs().max()) > 1.5


def test_noise_comes_from_the_caller_or_not_at_all():
    process = DiscreteDiffusion(CosineSchedule())
    denoiser = gaussian_denoiser(process)
    x_T, draws = normal(3, 1, 4, 4), normal(10, 3, 1, 4, 4, seed=2)
    random = DiffusersSampler(
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), num_steps=10
    )
    together = random.sample(process, denoiser, x_T, noise=iter(draws).__next__)
    alone = random.sample(process, denoiser, x_T[1:2], noise=iter(draws[:, 1:2]).__next__)
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=1e-6)
    assert not torch.allclose(together, random.sample(process, denoiser, x_T, noise=lambda: x_T))
    with pytest.raises(ConfigError, match="noise: must be given"):
        random.trajectory(process, denoiser, x_T)
    with pytest.raises(ConfigError, match=r"scheduler: must be one of .*, found DDPMScheduler"):
        DiffusersSampler(DDPMScheduler())
    single = DPMSolverSinglestepScheduler(algorithm_type="sde-dpmsolver++")
    with pytest.raises(ConfigError, match="noise of its own, found algorithm_type sde"):
        DiffusersSampler(single)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: UniPCMultistepScheduler(prediction_type="v_prediction"),
            "prediction_type .*v_pre",
        ),
        (
            lambda: UniPCMultistepScheduler(trained_betas=[0.1, 0.2]),
            r"trained_betas .*\[0.1, 0.2\]",
        ),
        (lambda: UniPCMultistepScheduler(beta_end=0.01), "beta_end .*found 0.01"),
        (lambda: UniPCMultistepScheduler(num_train_timesteps=50), "num_train_timesteps .*found 50"),
        (LCMScheduler, "must be one of DDIM.*found LCMScheduler"),
    ],
)
def test_settings_of_the_process_are_refused_on_the_scheduler(make, message):
    scheduler = make()
    with pytest.raises(ConfigError, match=message):
        DiffusersSampler(scheduler)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # Heun's own constructor
def test_bad_paths_are_refused():
    process = DiscreteDiffusion(LinearSchedule(100))
    short = process.respace(range(0, 100, 10))
    x_T = normal(1, 1, 2, 2)
    with pytest.raises(ConfigError, match="num_steps: must be at least 1, found 0"):
        DiffusersSampler(UniPCMultistepScheduler(), num_steps=0)
    with pytest.raises(ConfigError, match=r"num_steps: must be at most .*100 .*found 101"):
        DiffusersSampler(UniPCMultistepScheduler(), num_steps=101).num_calls(process)
    with pytest.raises(ConfigError, match=r"num_steps: .* on 10 timesteps.*repeats .*found 10"):
        DiffusersSampler(DPMSolverMultistepScheduler(), num_steps=10).num_calls(short)
    sampler = DiffusersSampler(UniPCMultistepScheduler(), num_steps=5)
    with pytest.raises(ConfigError, match=r"first_step: must be in \[0, 5\), found 5"):
        sampler.trajectory(process, gaussian_denoiser(process), x_T, first_step=5)
    karras = EulerDiscreteScheduler(use_karras_sigmas=True)
    with pytest.raises(ConfigError, match=r"whole timesteps.*timestep_spacing.*EulerDiscrete"):
        DiffusersSampler(karras, num_steps=7).num_calls(process)
    heun = DiffusersSampler(HeunDiscreteScheduler(), num_steps=5)
    with pytest.raises(ConfigError, match=r"first_step: must be even .*found 1"):
        next(heun.trajectory(process, gaussian_denoiser(process), x_T, first_step=1))
