"""Samplers and guidance on networks whose answer is known: properties, contract, bad input."""

import itertools
import weakref

import numpy as np
import pytest
import torch

from ant_lightning import (
    DDIM,
    DDPM,
    ConfigError,
    CosineSchedule,
    DiscreteDiffusion,
    GuidedDenoiser,
    LinearSchedule,
)

MEAN, STD = 0.3, 0.5


def gaussian_denoiser(process, *, calls=None):
    """The optimal network for pixels that are N(MEAN, STD²), in the type of the process."""

    def denoiser(x, t):
        assert t.dtype == torch.int64
        if calls is not None:
            calls.append(t.tolist())
        abar = process.alphas_cumprod[t].view(-1, 1, 1, 1)
        a, s = abar.sqrt(), (1 - abar).sqrt()
        x_start = MEAN + a * STD**2 / (abar * STD**2 + 1 - abar) * (x - a * MEAN)
        eps = (x - a * x_start) / s
        output = {"eps": eps, "x0": x_start, "v": a * eps - s * x_start}[process.prediction_type]
        if process.variance_type == "learned_range":
            output = torch.cat([output, torch.zeros_like(output)], dim=1)
        return output

    return denoiser


def exact_flow(process, x_T):
    """Where the probability-flow ODE takes x_T: standardise at T, unstandardise at 0."""
    abar = process.alphas_cumprod[-1]
    return MEAN + (x_T - abar.sqrt() * MEAN) * STD / (abar * STD**2 + 1 - abar).sqrt()


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_ddim_follows_the_probability_flow(kind):
    process = DiscreteDiffusion(CosineSchedule(), prediction_type=kind)
    x_T = normal(4, 1, 4, 4)
    wanted = exact_flow(process, x_T)
    errors = []
    for num_steps in (20, 80, 320):
        found = DDIM(num_steps, spacing="even").sample(
            process, gaussian_denoiser(process), x_T, clip_denoised=False
        )
        errors.append(float((found - wanted).abs().max()))
    # First order: four times the steps, about a quarter of the error.
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3
    assert errors[2] < 0.01


def ddpm_std(process, steps, variance_type):
    """Standard deviation that DDPM on `steps` leaves, followed step by step for N(MEAN, STD²)."""
    abar = process.alphas_cumprod.numpy()[steps]
    previous = np.append(1.0, abar[:-1])
    beta = 1 - abar / previous
    small = beta * (1 - previous) / (1 - abar)
    small[0] = small[1]
    noise = {"fixed_small": small, "fixed_large": beta, "learned_range": np.sqrt(small * beta)}
    variance = 1.0
    for i in reversed(range(len(steps))):
        shrink = np.sqrt(abar[i]) * STD**2 / (abar[i] * STD**2 + 1 - abar[i])
        gain = np.sqrt(previous[i]) * beta[i] / (1 - abar[i]) * shrink
        gain += np.sqrt(1 - beta[i]) * (1 - previous[i]) / (1 - abar[i])
        variance = gain**2 * variance + (noise[variance_type][i] if i else 0)
    return np.sqrt(variance)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_draws_what_its_chain_says(variance_type):
    process = DiscreteDiffusion(LinearSchedule(), variance_type=variance_type)
    generator = torch.Generator().manual_seed(1)

    def noise():
        return torch.randn(100, 1, 10, 10, dtype=torch.float64, generator=generator)

    found = DDPM(30).sample(
        process, gaussian_denoiser(process), noise(), noise=noise, clip_denoised=False
    )
    steps = np.round(np.linspace(0, 999, 30)).astype(int)
    # 10,000 values: standard errors of 0.005 and 0.0035.
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(found.std()) == pytest.approx(ddpm_std(process, steps, variance_type), abs=0.012)


@pytest.mark.parametrize("spacing", ["ddim", "even", "ldm", "ldm_quadratic"])
def test_inversion_and_sampling_undo_each_other(spacing):
    process = DiscreteDiffusion(CosineSchedule(), prediction_type="v")
    x_start = MEAN + STD * normal(2, 1, 4, 4)
    denoiser = gaussian_denoiser(process)
    errors = []
    for num_steps in (40, 200):
        sampler = DDIM(num_steps, spacing=spacing)
        x_T = sampler.invert(process, denoiser, x_start, clip_denoised=False)
        back = sampler.sample(process, denoiser, x_T, clip_denoised=False)
        errors.append(float((back - x_start).abs().max()))
    assert errors[1] < errors[0] / 3
    assert errors[1] < 0.02
    assert float(x_T.std()) == pytest.approx(float((x_start - MEAN).std()) / STD, rel=0.1)


def test_a_path_can_be_entered_in_the_middle():
    process = DiscreteDiffusion(LinearSchedule())
    for sampler in (
        DDPM(7),
        DDIM(10, eta=0.5),
        DDIM(10),
        DDIM(7, spacing="ldm"),
        DDIM(9, spacing="ldm_quadratic"),
    ):
        draws = list(normal(20, 2, 1, 4, 4, seed=4))
        calls = []
        denoiser = gaussian_denoiser(process, calls=calls)
        whole = list(
            sampler.trajectory(process, denoiser, normal(2, 1, 4, 4), noise=iter(draws).__next__)
        )
        assert len(calls) == len(whole) == sampler.num_calls(process)
        assert calls == [[step.timestep] * 2 for step in whole]
        assert all(a > b for a, b in itertools.pairwise(calls))
        late = sampler.sample(
            process, denoiser, whole[3].x, noise=iter(draws[4:]).__next__, first_step=4
        )
        torch.testing.assert_close(late, whole[-1].x, rtol=0, atol=0)


def test_an_image_does_not_depend_on_its_batch():
    process = DiscreteDiffusion(LinearSchedule())
    x_T, draws = normal(3, 1, 4, 4), normal(20, 3, 1, 4, 4, seed=5)
    denoiser = gaussian_denoiser(process)
    together = DDPM(10).sample(process, denoiser, x_T, noise=iter(draws).__next__)
    alone = DDPM(10).sample(process, denoiser, x_T[1:2], noise=iter(draws[:, 1:2]).__next__)
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=1e-12)


def test_sampling_makes_no_graph_clips_and_reuses_tables():
    process = DiscreteDiffusion(LinearSchedule())
    scale = torch.ones((), requires_grad=True, dtype=torch.float64)
    inner = gaussian_denoiser(process)
    steps = DDIM(5).trajectory(process, lambda x, t: scale * inner(x, t), 3 * normal(1, 1, 4, 4))
    assert all(float(step.x_start.detach().abs().max()) <= 1 for step in steps)
    x = DDIM(5).sample(process, lambda x, t: scale * inner(x, t), normal(1, 1, 4, 4))
    assert not x.requires_grad
    assert DDIM(5).respaced(process) is DDIM(5, eta=1.0).respaced(process)
    half = DDIM(5).sample(process, lambda x, t: x, torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16))
    assert half.dtype == torch.float32


def test_a_respaced_process_still_tells_original_timesteps():
    process = DiscreteDiffusion(LinearSchedule()).respace(range(0, 1000, 10))
    calls = []

    def denoiser(x, t):
        calls.append(int(t[0]))
        return torch.zeros_like(x)

    DDIM(4).sample(process, denoiser, normal(1, 1, 4, 4))
    assert calls == [750, 500, 250, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: DDPM(0), "num_steps: must be at least 1, found 0"),
        (lambda p: DDPM(10, spacing="ldm"), "spacing: must be one of even, ddim, found ldm"),
        (lambda p: DDIM(10, spacing="x"), "spacing: .*found x"),
        (lambda p: DDIM(10, eta=1.5), r"eta: must be from 0 to 1, found 1.5"),
        (lambda p: DDPM(101).num_calls(p), "num_steps: must be at most .*100 .*found 101"),
        (
            lambda p: DDIM(30).num_calls(p),
            "num_steps: .*whole stride through 100 timesteps, found 30",
        ),
        (lambda p: DDIM(100, spacing="ldm").num_calls(p), "num_steps: .*found 100"),
        (
            lambda p: DDIM(3, spacing="ldm_quadratic").num_calls(
                DiscreteDiffusion(CosineSchedule(5))
            ),
            r"1 \+ 0.8 T below T = 5 for spacing ldm_quadratic, found 3",
        ),
        (lambda p: DDPM(5).trajectory(p, None, normal(1, 1, 2, 2)), "noise: must be given to DDPM"),
        (
            lambda p: DDIM(5).trajectory(p, None, normal(1, 1, 2, 2), first_step=5),
            "first_step: .*5",
        ),
        (lambda p: DDIM(5).trajectory(p, None, normal(1, 1, 2, 2), first_step=-1), "found -1"),
    ],
)
def test_bad_sampler_settings_are_refused(call, message):
    process = DiscreteDiffusion(LinearSchedule(100))
    with pytest.raises(ConfigError, match=message):
        call(process)


def labelled_model(seen):
    """Four channels of x plus ten times the label, then four of variance: the label again."""

    def model(x, t, labels):
        seen.append((len(x), t.tolist(), labels.tolist()))
        shift = labels.to(x.dtype).view(-1, 1, 1, 1)
        return torch.cat([x + 10 * shift, (0 * x + shift)], dim=1)

    return model


def test_guidance_extrapolates_the_prediction_and_keeps_the_conditional_variance():
    x, t, labels = normal(2, 4, 2, 2), torch.tensor([5, 6]), torch.tensor([1, 3])
    shift = labels.view(-1, 1, 1, 1).double()
    for guided_channels, num_guided in ((None, 4), (3, 3)):
        seen = []
        denoiser = GuidedDenoiser(
            labelled_model(seen), labels, null_label=9, scale=1.5, guided_channels=guided_channels
        )
        found = denoiser(x, t)
        assert seen == [(4, [5, 6, 5, 6], [1, 3, 9, 9])]
        guided = (x + 90) + 1.5 * ((x + 10 * shift) - (x + 90))
        torch.testing.assert_close(found[:, :num_guided], guided[:, :num_guided])
        torch.testing.assert_close(found[:, num_guided:4], (x + 10 * shift)[:, num_guided:])
        torch.testing.assert_close(found[:, 4:], (0 * x + shift))


def test_scale_one_runs_the_conditional_branch_only():
    seen = []
    x, labels = normal(2, 4, 2, 2), torch.tensor([1, 3])
    denoiser = GuidedDenoiser(labelled_model(seen), labels, null_label=9, scale=1.0)
    found = denoiser(x, torch.tensor([5, 6]))
    assert seen == [(2, [5, 6], [1, 3])]
    torch.testing.assert_close(found[:, :4], x + 10 * labels.view(-1, 1, 1, 1))
    unconditional = GuidedDenoiser(
        lambda x, t, y: x if y is None else 0 * x, None, null_label=0, scale=1.0
    )
    assert torch.equal(unconditional(x, torch.tensor([5, 6])), x)


def test_bad_guidance_is_refused():
    labels = torch.tensor([1, 3])
    model = labelled_model([])
    with pytest.raises(ConfigError, match="scale: must be finite, found inf"):
        GuidedDenoiser(model, labels, null_label=9, scale=float("inf"))
    with pytest.raises(ConfigError, match=r"scale: must be 1 .*found 2.0"):
        GuidedDenoiser(model, None, null_label=9, scale=2.0)
    with pytest.raises(ConfigError, match="guided_channels: must be at least 1, found 0"):
        GuidedDenoiser(model, labels, null_label=9, scale=2.0, guided_channels=0)
    many = GuidedDenoiser(model, labels, null_label=9, scale=2.0, guided_channels=5)
    with pytest.raises(ConfigError, match=r"guided_channels: .*4, found 5"):
        many(normal(2, 4, 2, 2), torch.tensor([0, 0]))
    with pytest.raises(ConfigError, match=r"labels: must be 3, .*found 2"):
        many(normal(3, 4, 2, 2), torch.tensor([0, 0, 0]))


def test_sampling_holds_one_state_of_the_path_at_a_time():
    process = DiscreteDiffusion(CosineSchedule(20))
    alive, most = [], 0

    def denoiser(x, timesteps):
        nonlocal most
        alive.append(weakref.ref(x))
        most = max(most, sum(each() is not None for each in alive))
        return torch.zeros_like(x)

    DDIM(num_steps=20).sample(process, denoiser, torch.randn(1, 1, 2, 2))
    assert len(alive) == 20
    assert most <= 3
