"""Schedules, the process, its conversions, its losses and weightings: properties and bad input."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ant_lightning import (
    P2,
    ConfigError,
    CosineSchedule,
    DiscreteDiffusion,
    LinearSchedule,
    LossWeighting,
    MinSNR,
    ScaledLinearSchedule,
    TableSchedule,
    denoising_loss,
    variational_bound,
)
from ant_lightning.diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from ant_lightning.diffusion.samplers.spacing import space_timesteps

KINDS = ["eps", "x0", "v"]
few = settings(deadline=None, max_examples=12)
schedules = st.one_of(
    st.builds(LinearSchedule, st.integers(21, 400)),
    st.builds(CosineSchedule, st.integers(1, 400)),
    st.builds(ScaledLinearSchedule, st.integers(1, 400)),
    st.builds(TableSchedule, st.lists(st.floats(1e-5, 0.99), min_size=1, max_size=12)),
)


def batch(num_timesteps, *, size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_start, noise = torch.randn(2, size, 3, 4, 4, dtype=torch.float64, generator=generator)
    t = torch.randint(num_timesteps, (size,), generator=generator)
    return x_start.clamp(-1, 1), noise, t


@few
@given(schedules)
def test_alphas_cumprod_decreases_and_tables_are_finite(schedule):
    process = DiscreteDiffusion(schedule)
    betas = schedule()
    assert betas.dtype == torch.float64
    assert betas.shape == (process.num_timesteps,)
    abar = np.cumprod(1 - betas.numpy())
    np.testing.assert_allclose(process.alphas_cumprod, abar, rtol=1e-12)
    assert bool((process.alphas_cumprod.diff() < 0).all())
    assert all(bool(table.isfinite().all()) for table in process.tables(torch.device("cpu")))
    np.testing.assert_allclose(process.log_snr, np.log(process.snr.numpy()), rtol=1e-9, atol=1e-9)


@few
@given(schedules, st.sampled_from(KINDS), st.integers(0, 2**16))
def test_the_target_gives_x_start_back(schedule, kind, seed):
    process = DiscreteDiffusion(schedule, prediction_type=kind)
    x_start, noise, t = batch(process.num_timesteps, seed=seed)
    x_t = process.q_sample(x_start, t, noise)
    target = process.target(x_start, noise, t)
    # eps and v divide by the signal: what float64 keeps of x_start shrinks with it.
    signal = float(process.alphas_cumprod[t].min().sqrt())
    atol = 1e-14 / signal + 1e-12
    torch.testing.assert_close(process.to_x_start(target, x_t, t), x_start, rtol=0, atol=atol)
    noise_level = float((1 - process.alphas_cumprod[t]).min().sqrt())
    torch.testing.assert_close(
        process.to_eps(target, x_t, t), noise, rtol=0, atol=1e-14 / noise_level + 1e-12
    )


@few
@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(0, 2**16))
def test_conversions_are_inverse_pairs(first, second, seed):
    process = DiscreteDiffusion(LinearSchedule(), prediction_type=first)
    prediction, x_t, t = batch(1000, seed=seed)
    convert = {"eps": process.to_eps, "x0": process.to_x_start, "v": process.to_v}
    there = convert[second](prediction, x_t, t)
    back = convert[first](there, x_t, t, prediction_type=second)
    torch.testing.assert_close(back, prediction, rtol=1e-9, atol=1e-9)


def test_formulas_of_one_timestep():
    betas = [0.1, 0.2, 0.4]
    process = DiscreteDiffusion(TableSchedule(betas), prediction_type="v")
    x_start, noise = torch.tensor([[[0.5]], [[-0.3]]], dtype=torch.float64)
    t = torch.tensor([2])
    abar, previous = 0.9 * 0.8 * 0.6, 0.9 * 0.8
    x_t = math.sqrt(abar) * 0.5 - math.sqrt(1 - abar) * 0.3
    assert float(process.q_sample(x_start, t, noise)) == pytest.approx(x_t, rel=1e-12)
    v = math.sqrt(abar) * -0.3 - math.sqrt(1 - abar) * 0.5
    assert float(process.target(x_start, noise, t)) == pytest.approx(v, rel=1e-12)
    # Bayes: q(x_1 | x_2, x_0) is the product of two Gaussians.
    precision = 0.6 / 0.4 + 1 / (1 - previous)
    mean = (math.sqrt(0.6) * x_t / 0.4 + math.sqrt(previous) * 0.5 / (1 - previous)) / precision
    found = process.q_posterior(x_start, torch.tensor([[x_t]], dtype=torch.float64), t)
    assert float(found[0]) == pytest.approx(mean, rel=1e-12)
    assert float(found[1]) == pytest.approx(1 / precision, rel=1e-12)
    assert float(found[2]) == pytest.approx(-math.log(precision), rel=1e-12)


@few
@given(st.data())
def test_respacing_keeps_the_marginals(data):
    process = DiscreteDiffusion(CosineSchedule(40), variance_type="learned_range")
    kept = sorted(data.draw(st.sets(st.integers(0, 39), min_size=1)))
    respaced = process.respace(kept)
    assert respaced.timestep_map.tolist() == kept
    np.testing.assert_allclose(respaced.alphas_cumprod, process.alphas_cumprod[kept], rtol=1e-10)
    assert respaced.variance_type == "learned_range"
    assert process.respace(kept) is respaced
    again = respaced.respace(range(0, len(kept), 2))
    assert again.timestep_map.tolist() == kept[::2]


def test_half_precision_is_computed_in_float32_and_tables_stay_float64():
    process = DiscreteDiffusion(LinearSchedule(), variance_type="learned_range")
    x_start, noise, t = batch(1000)
    x_t = process.q_sample(x_start.bfloat16(), t, noise.bfloat16())
    assert x_t.dtype == torch.float32
    output = torch.cat([noise, noise], dim=1).bfloat16()
    assert process.p_mean_variance(output, x_t, t).mean.dtype == torch.float32
    args = (x_start.bfloat16(), x_t.bfloat16(), t, noise.bfloat16())
    terms = denoising_loss(process, output, *args)
    assert terms.loss.dtype == terms.mse.dtype == torch.float32
    assert process.betas.dtype == torch.float64


def test_copies_and_pickles_carry_no_caches():
    process = DiscreteDiffusion(LinearSchedule(50), prediction_type="v").respace([3, 10, 40])
    process.respace([0, 2])
    for twin in (copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
        assert torch.equal(twin.betas, process.betas)
        assert twin.timestep_map.tolist() == [3, 10, 40]
        assert twin.prediction_type == "v"
        assert twin.respace([0, 2]) is not process.respace([0, 2])
        x_start, noise, t = batch(3)
        torch.testing.assert_close(
            twin.q_sample(x_start, t, noise), process.q_sample(x_start, t, noise)
        )


def test_tables_made_in_inference_mode_serve_training():
    process = DiscreteDiffusion(LinearSchedule(50), variance_type="learned_range")
    x_start, noise, t = batch(5)
    with torch.inference_mode():
        # Validation may be the first to ask for a respaced process, or for another device.
        respaced = process.respace(range(0, 50, 10))
        respaced.q_sample(x_start, t, noise)
    output = torch.cat([noise, noise], dim=1).requires_grad_()
    x_t = respaced.q_sample(x_start, t, noise)
    denoising_loss(respaced, output, x_start, x_t, t, noise).loss.sum().backward()
    assert output.grad is not None
    assert bool((output.grad[:, 3:] != 0).any())


def test_timesteps_outside_the_table_are_refused():
    process = DiscreteDiffusion(LinearSchedule(50))
    x = torch.zeros(1, 3, 4, 4)
    for wrong in (-1, 50):
        with pytest.raises((IndexError, RuntimeError)):
            process.q_sample(x, torch.tensor([wrong]), x)


def test_learned_range_spans_posterior_variance_to_beta():
    process = DiscreteDiffusion(LinearSchedule(), variance_type="learned_range")
    x, eps, _ = batch(1000, size=2)
    t = torch.tensor([7, 900])
    for value, name in ((-1.0, "posterior_variance"), (1.0, "betas")):
        output = torch.cat([eps, torch.full_like(eps, value)], dim=1)
        variance = process.p_mean_variance(output, x, t).variance
        wanted = getattr(process.tables(torch.device("cpu")), name)[t]
        torch.testing.assert_close(variance[:, 0, 0, 0], wanted)


def test_hybrid_loss_trains_the_variance_with_the_bound_and_the_mean_with_the_mse():
    process = DiscreteDiffusion(LinearSchedule(), variance_type="learned_range")
    x_start, noise, _ = batch(1000)
    t = torch.tensor([0, 1, 10, 500, 999])
    x_t = process.q_sample(x_start, t, noise)
    output = torch.randn(
        5, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    ).requires_grad_()
    weights = torch.linspace(0.5, 2, 1000, dtype=torch.float64)
    terms = denoising_loss(process, output, x_start, x_t, t, noise, weights=weights, vb_scale=0.25)
    mse = (noise - output[:, :3]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(terms.mse, mse)
    bound = variational_bound(process, output, x_start, x_t, t)
    torch.testing.assert_close(terms.vb, 0.25 * bound)
    torch.testing.assert_close(terms.loss, weights[t] * mse + 0.25 * bound)
    (found,) = torch.autograd.grad(terms.loss.sum(), output, retain_graph=True)
    (from_mse,) = torch.autograd.grad((weights[t] * mse).sum(), output)
    (from_bound,) = torch.autograd.grad(0.25 * bound.sum(), output)
    torch.testing.assert_close(found[:, :3], from_mse[:, :3])
    torch.testing.assert_close(found[:, 3:], from_bound[:, 3:])
    assert bool((from_bound[:, :3] != 0).any())


def test_kl_equals_torch_distributions():
    m1, m2, lv1, lv2 = torch.randn(
        4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    first = torch.distributions.Normal(m1, (0.5 * lv1).exp())
    second = torch.distributions.Normal(m2, (0.5 * lv2).exp())
    wanted = torch.distributions.kl_divergence(first, second)
    torch.testing.assert_close(normal_kl(m1, lv1, m2, lv2), wanted)


def test_probabilities_of_all_pixel_values_sum_to_one():
    pixels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, scale in ((0.2, 0.1), (-0.97, 0.05), (0.0, 2.0)):
        log_prob = discretized_gaussian_log_likelihood(
            pixels,
            mean=torch.full_like(pixels, mean),
            log_scale=torch.full_like(pixels, math.log(scale)),
        )
        assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-9)
        centre = int(log_prob[1:-1].argmax()) + 1
        assert abs(float(pixels[centre]) - mean) < 2 / 255


@few
@given(
    st.sampled_from([MinSNR(), MinSNR(gamma=0.7), P2(), P2(gamma=0.5, k=2.0)]),
    st.integers(0, 2**16),
)
def test_a_weighting_is_one_objective_whatever_is_predicted(weighting, seed):
    """The same error of x_start costs the same through each prediction type."""
    snr = DiscreteDiffusion(LinearSchedule()).snr
    x_start, noise, t = batch(1000, seed=seed)
    error = torch.randn(x_start.shape, dtype=torch.float64)
    weighted = []
    for kind in KINDS:
        process = DiscreteDiffusion(LinearSchedule(), prediction_type=kind)
        x_t = process.q_sample(x_start, t, noise)
        wrong = x_start + error
        convert = {"eps": process.to_eps, "x0": process.to_x_start, "v": process.to_v}[kind]
        output = convert(wrong, x_t, t, prediction_type="x0")
        weights = weighting(snr, kind)
        weighted.append(
            denoising_loss(process, output, x_start, x_t, t, noise, weights=weights).loss
        )
    torch.testing.assert_close(weighted[0], weighted[1], rtol=1e-8, atol=0)
    torch.testing.assert_close(weighted[2], weighted[1], rtol=1e-8, atol=0)


def test_weighting_is_a_base_class():
    with pytest.raises(TypeError):
        LossWeighting()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearSchedule(0), "num_timesteps: must be at least 1, found 0"),
        (lambda: LinearSchedule(beta_start=0.0), "beta_start = 0.0"),
        (lambda: LinearSchedule(beta_start=0.1, beta_end=0.05), "beta_end = 0.05"),
        (lambda: LinearSchedule(beta_end=math.nan), "beta_end = nan"),
        (LinearSchedule(20), r"LinearSchedule: .*betas\[19\] = 1.0 for 20 timesteps"),
        (lambda: CosineSchedule(max_beta=1.0), "max_beta: must be above 0 and below 1, found 1.0"),
        (lambda: ScaledLinearSchedule(beta_end=1.5), "beta_start: .*beta_end = 1.5"),
        (lambda: TableSchedule([]), "num_timesteps"),
        (TableSchedule([0.1, -0.2]), r"betas\[1\] = -0.2"),
        (lambda: DiscreteDiffusion(LinearSchedule(), prediction_type="x1"), "found x1"),
        (lambda: DiscreteDiffusion(LinearSchedule(), variance_type="big"), "variance_type.*big"),
        (
            lambda: DiscreteDiffusion(LinearSchedule(50)).respace([]),
            "timesteps: must be increasing",
        ),
        (lambda: DiscreteDiffusion(LinearSchedule(50)).respace([2, 2]), r"found \[2, 2\]"),
        (lambda: DiscreteDiffusion(LinearSchedule(50)).respace([3, 50]), r"\[0, 50\)"),
        (lambda: DiscreteDiffusion(LinearSchedule(50)).respace([-1, 3]), r"\[-1, 3\]"),
        (lambda: MinSNR(gamma=0.0), "gamma: must be above 0, found 0.0"),
        (lambda: P2(gamma=-1.0), "gamma: must be at least 0, found -1.0"),
        (lambda: P2(k=0.0), "k: must be above 0, found 0.0"),
        (lambda: MinSNR()(torch.zeros(3), "eps"), "snr: must be above 0, found 0.0"),
        (lambda: MinSNR()(torch.ones(3), "x_0"), "prediction_type: .*found x_0"),
        (lambda: space_timesteps(100, [3, -1]), r"found \[3, -1\]"),
        (lambda: space_timesteps(100, []), r"found \[\]"),
        (lambda: space_timesteps(10, [4, 6]), "at most 5 for section 1 of 10 timesteps, found 6"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_wrong_channels_and_weights_are_refused():
    process = DiscreteDiffusion(LinearSchedule(), variance_type="learned_range")
    x, _, t = batch(1000)
    assert process.output_channels(3) == 6
    with pytest.raises(ConfigError, match=r"model_output: must have 6 channels .*found 3"):
        process.p_mean_variance(x, x, t)
    with pytest.raises(ConfigError, match=r"weights: must have the shape \[1000\].*found \[10\]"):
        denoising_loss(process, torch.cat([x, x], 1), x, x, t, x, weights=torch.ones(10))
