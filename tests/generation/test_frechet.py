"""The Fréchet distance and its moments, against closed forms and numpy."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from ant_lightning import ConfigError, GaussianStatistics, frechet_distance
from ant_lightning.generation.frechet import RankDeficientWarning, warn_if_rank_deficient


def _gaussian(mean, covariance, num_samples=None):
    return GaussianStatistics(
        torch.as_tensor(mean, dtype=torch.float64),
        torch.as_tensor(covariance, dtype=torch.float64),
        num_samples,
    )


def _rotation(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    dimension=st.integers(1, 8),
    zeros=st.tuples(st.integers(0, 8), st.integers(0, 8)),
)
@example(seed=999999999, dimension=5, zeros=(0, 2))  # rounding made every Cholesky pivot positive
def test_commuting_covariances_have_a_closed_form_singular_ones_too(seed, dimension, zeros):
    rng = np.random.default_rng(seed)
    variances = rng.uniform(0.1, 4, size=(2, dimension))
    for row, count in zip(variances, zeros, strict=True):
        row[rng.permutation(dimension)[:count]] = 0
    means = rng.normal(size=(2, dimension))
    basis = _rotation(rng, dimension)
    first, second = (
        _gaussian(mean, basis @ np.diag(row) @ basis.T)
        for mean, row in zip(means, variances, strict=True)
    )
    expected = ((means[0] - means[1]) ** 2).sum()
    expected += ((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_rank_deficient_pair_has_the_distance_it_has_in_its_own_subspace():
    """Ten dimensions embedded in sixty: the other fifty must not add their rounding."""
    rng = np.random.default_rng(3)
    frame = _rotation(rng, 60)[:, :10]
    small = [rng.normal(size=(40, 10)) @ rng.normal(size=(10, 10)) for _ in range(2)]
    exact = frechet_distance(
        *(GaussianStatistics.from_features(torch.from_numpy(x)) for x in small)
    )
    embedded = frechet_distance(
        *(GaussianStatistics.from_features(torch.from_numpy(x @ frame.T)) for x in small)
    )
    assert exact > 1
    assert embedded == pytest.approx(exact, rel=1e-9)


def test_regular_covariances_equal_the_matrix_square_root_of_scipy():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(4)
    features = [rng.normal(i, 1, size=(300, 20)) @ rng.normal(size=(20, 20)) for i in range(2)]
    means = [x.mean(0) for x in features]
    covariances = [np.cov(x, rowvar=False) for x in features]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    value = frechet_distance(
        *(_gaussian(mean, cov) for mean, cov in zip(means, covariances, strict=True))
    )
    assert value == pytest.approx(expected, rel=1e-8)


def test_moments_equal_numpy_however_they_are_split():
    rng = np.random.default_rng(5)
    features = rng.normal(3, 1, size=(2500, 6)).astype(np.float32)  # three chunks
    exact = features.astype(np.float64)
    whole = GaussianStatistics.from_features(torch.from_numpy(features))
    batches = torch.from_numpy(exact).split(300)
    total, outer = sum(b.sum(0) for b in batches), sum(b.T @ b for b in batches)
    for statistics in (whole, GaussianStatistics.from_sums(2500, total, outer)):
        assert statistics.num_samples == 2500
        assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64
        np.testing.assert_allclose(statistics.mean.numpy(), exact.mean(0), rtol=1e-12)
        np.testing.assert_allclose(
            statistics.covariance.numpy(), np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12
        )


def test_float64_features_are_not_changed_in_place():
    features = torch.arange(12, dtype=torch.float64).view(6, 2)
    before = features.clone()
    GaussianStatistics.from_features(features)
    assert torch.equal(features, before)


def test_bad_input_names_the_rule_and_the_value():
    good = _gaussian(np.zeros(2), np.eye(2))
    with pytest.raises(ConfigError, match="second: must have 2 features as first, found 3"):
        frechet_distance(good, _gaussian(np.zeros(3), np.eye(3)))
    with pytest.raises(ConfigError, match="finite"):
        frechet_distance(good, _gaussian(np.array([0, np.nan]), np.eye(2)))
    with pytest.raises(ConfigError, match=r"n >= 2, found \[1, 4\]"):
        GaussianStatistics.from_features(torch.zeros(1, 4))
    with pytest.raises(ConfigError, match="at least 2 for a covariance, found 0"):
        GaussianStatistics.from_sums(0, torch.zeros(4), torch.zeros(4, 4))


def test_too_few_images_warn_with_the_rank():
    with pytest.warns(RankDeficientWarning, match="64 real images for 64 .* rank at most 63"):
        warn_if_rank_deficient(_gaussian(np.zeros(64), np.eye(64), 64), what="real images")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_rank_deficient(_gaussian(np.zeros(64), np.eye(64), 65), what="real images")
