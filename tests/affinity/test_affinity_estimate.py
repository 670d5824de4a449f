import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ant_lightning import (
    AffinityResult,
    corrected_affinity,
    plain_affinity,
    split_half_reliability,
)
from ant_lightning.affinity.estimate import corrected_standard_error


def half_dots(a, b):
    """`[2, 2, n, n]` products of rows `[n, p]`, in numpy."""
    return torch.from_numpy(np.einsum("gip,hjp->ghij", np.stack([a, b]), np.stack([a, b])))


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 9),
    p=st.integers(1, 12),
    log_scale=st.floats(-8, 8),
)
@settings(max_examples=60, deadline=None)
def test_plain_is_a_matrix_of_cosines_whatever_the_scale_of_the_loss(seed, n, p, log_scale):
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((2, n, p))
    plain = plain_affinity(half_dots(a, b)).numpy()
    mean = (a + b) / 2
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(plain, unit @ unit.T, atol=1e-7)
    assert (plain == plain.T).all()
    assert (np.diag(plain) == 1).all()
    assert np.linalg.eigvalsh(plain).min() > -1e-7
    scale = 10.0 ** (log_scale * random.uniform(-1, 1, (n, 1)))
    rescaled = plain_affinity(half_dots(scale * a, scale * b)).numpy()
    np.testing.assert_allclose(rescaled, plain, atol=1e-7)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 8), log_scale=st.floats(-8, 8))
@settings(max_examples=40, deadline=None)
def test_corrected_is_symmetric_with_unit_diagonal_whatever_the_scale(seed, n, log_scale):
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((2, n, 30))
    a[0] = -b[0]
    corrected = corrected_affinity(half_dots(a, b)).numpy()
    positive = (a * b).sum(1) > 0
    good = np.ix_(positive, positive)
    cross = (a @ b.T + b @ a.T) / 2
    own = (a * b).sum(1)[positive]
    np.testing.assert_allclose(corrected[good], cross[good] / np.sqrt(np.outer(own, own)), 1e-9)
    assert np.isnan(corrected[~positive]).all()
    assert np.isnan(corrected[:, ~positive]).all()
    scale = 10.0 ** (log_scale * random.uniform(-1, 1, (n, 1)))
    rescaled = corrected_affinity(half_dots(scale * a, scale * b)).numpy()
    np.testing.assert_allclose(rescaled, corrected, 1e-9)


@pytest.mark.parametrize(("cosine", "reliability"), [(1, 1), (0.5, 2 / 3), (0, 0), (-1, -1)])
def test_reliability_is_spearman_browns(cosine, reliability):
    a = np.array([[3.0, 0.0]])
    b = 0.1 * np.array([[cosine, np.sqrt(1 - cosine**2)]])
    found = split_half_reliability(half_dots(a, b))
    np.testing.assert_allclose(found.numpy(), [reliability], atol=1e-12)


def synthetic(random, *, n, p, noise):
    """Gradients with known cosines `0.85^|i-j|`, of lengths 0.5 to 5, and two noisy halves."""
    truth = 0.85 ** np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    basis = np.linalg.qr(random.standard_normal((p, n)))[0].T
    length = np.linspace(0.5, 5, n)[:, None]
    signal = length * (np.linalg.cholesky(truth) @ basis)
    halves = signal + noise * length / np.sqrt(p) * random.standard_normal((2, n, p))
    return truth, halves


def test_corrected_recovers_known_cosines_within_its_interval():
    n, off = 10, ~np.eye(10, dtype=bool)
    random = np.random.default_rng(5)
    plain, corrected, inside, reliability = [], [], [], []
    for _ in range(80):
        truth, (a, b) = synthetic(random, n=n, p=300, noise=1.0)
        dots = half_dots(a, b)
        plain.append(plain_affinity(dots).numpy())
        corrected.append(corrected_affinity(dots).numpy())
        error = corrected_standard_error(dots).numpy()
        assert (np.diag(error) == 0).all()
        inside.append((np.abs(corrected[-1] - truth) < 1.96 * error)[off].mean())
        reliability.append(split_half_reliability(dots).numpy())
    # Signal 1 and noise 1 in each half: the mean has signal 1 and noise 1/2.
    np.testing.assert_allclose(np.mean(reliability, 0), 2 / 3, atol=0.02)
    assert 0.90 < np.mean(inside) < 0.99
    bias = np.abs(np.mean(corrected, 0) - truth)[off]
    assert bias.max() < 0.03
    # The plain cosine is attenuated by the reliability, here by a third.
    np.testing.assert_allclose((np.mean(plain, 0) / truth)[off].mean(), 2 / 3, atol=0.02)


def test_standard_error_falls_with_the_noise_and_is_nan_with_the_estimate():
    random = np.random.default_rng(0)
    means = []
    for noise in (0.1, 0.5):
        _, (a, b) = synthetic(random, n=10, p=300, noise=noise)
        means.append(corrected_standard_error(half_dots(a, b)).numpy().mean())
    assert 3 < means[1] / means[0] < 8
    b[4] = -a[4]
    error = corrected_standard_error(half_dots(a, b))
    assert error[4].isnan().all()
    assert error.isnan().sum() == 19


def test_shapes_may_have_leading_dimensions():
    random = np.random.default_rng(1)
    parts = [half_dots(*random.standard_normal((2, 4, 9))) for _ in range(3)]
    for function in (plain_affinity, split_half_reliability, corrected_standard_error):
        stacked = function(torch.stack(parts))
        expected = torch.stack([function(part) for part in parts])
        torch.testing.assert_close(stacked, expected, equal_nan=True)


def test_message_names_at_most_eight_timesteps():
    # Halves at an angle with cosine r have reliability 2 r / (1 + r).
    reliability = np.linspace(0, 1, 21)
    r = reliability / (2 - reliability)
    halves = np.stack([[[1.0, 0.0]] * 21, np.stack([r, np.sqrt(1 - r**2)], axis=1)])
    measured = AffinityResult(tuple(range(0, 210, 10)), 210, half_dots(*halves)[None])
    message = measured.reliability_warning(below=0.79)
    assert "below 0.79 at 16 of 21 timesteps (0, 10, 20, 30, 40, 50, 60, 70, ...; " in message
    assert "lowest 0.00 at timestep 0" in message
    assert measured.reliability_warning(below=0.0) is None
