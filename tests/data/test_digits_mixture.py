"""The mixture of digits and its exact denoiser."""

import numpy as np
import pytest
import torch

from ant_lightning import ConfigError, DigitsMixtureData, GaussianMixture


def mixture(m=3, d=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(m, generator=generator, dtype=torch.float64) + 0.2
    roots = torch.randn(m, d, d, generator=generator, dtype=torch.float64)
    covariances = 0.1 * roots @ roots.mT + 0.02 * torch.eye(d, dtype=torch.float64)
    means = torch.randn(m, d, generator=generator, dtype=torch.float64)
    return GaussianMixture(weights / weights.sum(), means, covariances)


def one(value):
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize("alphas_cumprod", [0.9, 0.5, 0.05])
def test_the_exact_denoiser_agrees_with_monte_carlo(alphas_cumprod):
    """Self-normalised importance sampling: x_start from the prior, weighted by p(x_t | x_start)."""
    target, generator = mixture(), torch.Generator().manual_seed(1)
    a, s = alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5
    x_start, _ = target.draw(400_000, generator=generator)
    x_t = a * x_start[:4] + s * torch.randn(4, 2, generator=generator, dtype=torch.float64)
    exact = target.denoise(x_t, a=one(a).expand(4), s=one(s).expand(4))
    for row, expected in zip(x_t, exact, strict=True):
        eps = (row - a * x_start) / s
        weights = (-0.5 * eps.square().sum(1)).softmax(0)
        mean = weights @ eps
        error = (weights.square() @ (eps - mean).square()).sqrt()
        assert (error < 0.05).all()  # the estimate says something
        assert ((mean - expected).abs() < 4.5 * error).all()


def test_one_component_without_correlation_is_the_textbook_formula():
    target = GaussianMixture(one(1.0), one(0.3)[:, None], one(0.25)[:, None, None])
    x_t, a, s = one(0.9)[:, None], one(0.6), one(0.8)
    expected = 0.8 * (0.9 - 0.6 * 0.3) / (0.36 * 0.25 + 0.64)
    assert target.denoise(x_t, a=a, s=s).item() == pytest.approx(expected, rel=1e-12)


def test_limits_of_all_and_no_noise():
    target, generator = mixture(d=4), torch.Generator().manual_seed(2)
    x_start, _ = target.draw(64, generator=generator)
    eps = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    ones = torch.ones(64, dtype=torch.float64)
    # alpha -> 0: x_t is the noise.
    np.testing.assert_allclose(target.denoise(eps, a=0 * ones, s=ones), eps, rtol=1e-12)
    # alpha -> 1: nothing is known of the noise, and x_start is x_t - s E[eps].
    s = 1e-4
    x_t = (1 - s * s) ** 0.5 * x_start + s * eps
    guess = target.denoise(x_t, a=(1 - s * s) ** 0.5 * ones, s=s * ones)
    assert guess.abs().max() < 0.05
    np.testing.assert_allclose(x_t - s * guess, x_start, atol=10 * s)


def test_far_from_every_component_nothing_overflows():
    target = mixture()
    out = target.denoise(torch.full((1, 2), 1e4), a=one(0.9999), s=one(0.0141))
    assert out.isfinite().all()


def test_draws_have_the_moments_of_the_mixture():
    target = mixture()
    samples, components = target.draw(200_000, generator=torch.Generator().manual_seed(3))
    shares = torch.bincount(components).double() / len(components)
    np.testing.assert_allclose(shares, target.weights, atol=0.006)
    for i in range(3):
        own = samples[components == i]
        np.testing.assert_allclose(own.mean(0), target.means[i], atol=0.02)
        np.testing.assert_allclose(own.mT.cov(), target.covariances[i], atol=0.02)


def test_the_data_are_endless_reproducible_and_look_like_digits():
    data = DigitsMixtureData(num_images=500, num_held_out=300)
    train, held_out = data.train_images, data.held_out_images
    first = train.load([3, 1], epoch=0)
    assert first.images.shape == (2, 1, 8, 8)
    assert first.images.dtype == torch.float32
    assert first.labels.tolist() == [0, 0]
    other = train.load([3, 1], epoch=1).images
    assert not torch.equal(first.images, other)  # no image twice
    assert torch.equal(train.load([1], epoch=0).images[0], first.images[1])
    assert torch.equal(
        DigitsMixtureData(num_images=500).train_images.load([3, 1], epoch=1).images, other
    )
    assert not torch.equal(held_out.load([3], epoch=None).images[0], first.images[0])
    every = train.load(list(range(500)), epoch=0).images
    from ant_lightning.data.digits import load_digits

    real = load_digits()[0]
    np.testing.assert_allclose(every.mean(0), real.mean(0), atol=0.15)
    assert every.std(0).mean().item() == pytest.approx(real.std(0).mean().item(), rel=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DigitsMixtureData(num_images=0), "^num_images: .* found 0"),
        (lambda: DigitsMixtureData(num_components=0).mixture, "^num_components: .* found 0"),
        (lambda: DigitsMixtureData(regularization=0).mixture, "^regularization: .* found 0"),
        (lambda: GaussianMixture(one(1.0), torch.zeros(1, 2), torch.eye(2)), "^means: must be"),
        (
            lambda: GaussianMixture(one(0.5), torch.zeros(1, 2), torch.eye(2)[None]),
            "positive with sum 1",
        ),
        (
            lambda: GaussianMixture(one(1.0), torch.zeros(1, 2), -torch.eye(2)[None]),
            "positive definite, found the eigenvalue -1",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
