import numpy as np
import pytest
import scipy.stats
import torch

from ant_lightning import ConfigError, affinity_by_distance, distance_correlation
from ant_lightning.randomness import keyed_generator


def noisy(n, seed, strength=1.0):
    """Affinity that falls with the distance of uneven positions, with noise; symmetric."""
    random = np.random.default_rng(seed)
    positions = np.sort(random.uniform(0, 10, n))
    noise = random.normal(0, 0.2, (n, n))
    affinity = strength * np.exp(-np.abs(np.subtract.outer(positions, positions)) / 3)
    return torch.from_numpy(affinity + (noise + noise.T) / 2), torch.from_numpy(positions)


def test_bins_are_means_over_pairs():
    affinity, positions = noisy(15, 0)
    affinity[2, 5] = affinity[5, 2] = torch.nan
    found = affinity_by_distance(affinity, positions, num_bins=6)
    pairs = [
        (abs(float(positions[i] - positions[j])), float(affinity[i, j]))
        for i in range(15)
        for j in range(i + 1, 15)
        if (i, j) != (2, 5)
    ]
    largest = max(distance for distance, _ in pairs)
    groups = [[] for _ in range(6)]
    for distance, value in pairs:
        groups[min(int(distance / (largest / 6)), 5)].append((distance, value))
    for b, group in enumerate(groups):
        assert found.num_pairs[b] == len(group)
        distances, values = np.array(group).T
        np.testing.assert_allclose(found.distance[b], distances.mean())
        np.testing.assert_allclose(found.mean[b], values.mean())
        np.testing.assert_allclose(found.std[b], values.std())


def test_bins_without_a_pair_are_left_out():
    positions = torch.tensor([0.0, 1.0, 100.0])
    found = affinity_by_distance(torch.eye(3), positions, num_bins=50)
    assert found.num_pairs.tolist() == [1, 2]
    assert found.mean.tolist() == [0, 0]
    same = affinity_by_distance(torch.eye(2), torch.zeros(2))
    assert same.num_pairs.tolist() == [1]


@pytest.mark.parametrize("ties", [False, True])
def test_correlation_is_spearmans(ties):
    affinity, positions = noisy(12, 1)
    if ties:
        affinity, positions = affinity.round(decimals=1), positions.round()
    i, j = np.triu_indices(12, 1)
    expected = scipy.stats.spearmanr(
        affinity.numpy()[i, j], np.abs(positions.numpy()[i] - positions.numpy()[j])
    )
    found = distance_correlation(affinity, positions, num_resamples=50)
    assert found.estimate == pytest.approx(expected.statistic, abs=1e-12)
    assert found.low < found.estimate < found.high < 0


def test_monotone_affinity_has_correlation_minus_one():
    _, positions = noisy(10, 2)
    affinity = 1 / (1 + (positions[:, None] - positions).abs())
    found = distance_correlation(affinity, positions, num_resamples=20)
    assert (found.estimate, found.low, found.high) == pytest.approx((-1, -1, -1))


def test_interval_holds_zero_for_unrelated_affinity_as_often_as_it_says():
    held = []
    for seed in range(40):
        affinity, positions = noisy(16, seed, strength=0.0)
        found = distance_correlation(affinity, positions, num_resamples=60, seed=seed)
        held.append(found.low <= 0 <= found.high)
    assert np.mean(held) >= 0.8


def test_interval_depends_on_its_seed_alone():
    affinity, positions = noisy(10, 3)
    one = distance_correlation(affinity, positions, num_resamples=30, seed=1)
    torch.manual_seed(99)
    assert one == distance_correlation(affinity, positions, num_resamples=30, seed=1)
    assert one != distance_correlation(affinity, positions, num_resamples=30, seed=2)
    wide = distance_correlation(affinity, positions, num_resamples=200, confidence=0.99)
    narrow = distance_correlation(affinity, positions, num_resamples=200, confidence=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("function", [affinity_by_distance, distance_correlation])
def test_arrays_that_do_not_fit_are_refused(function):
    with pytest.raises(ConfigError, match=r"found shapes \(3, 3\) and \(4,\)"):
        function(torch.eye(3), torch.arange(4))
    with pytest.raises(ConfigError, match="must have at least one finite pair"):
        function(torch.full((3, 3), torch.nan), torch.arange(3))
    with pytest.raises(ConfigError, match="at least one finite pair"):
        function(torch.eye(1), torch.arange(1))


@pytest.mark.parametrize(
    "settings", [{"num_resamples": 0}, {"confidence": 1.0}, {"confidence": 0.0}]
)
def test_bad_settings_are_named(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=f"{name}.*{value}"):
        distance_correlation(torch.eye(3), torch.arange(3), **settings)


def test_no_bins_is_refused():
    with pytest.raises(ConfigError, match="num_bins: must be at least 1, found 0"):
        affinity_by_distance(torch.eye(3), torch.arange(3), num_bins=0)


def test_two_timesteps_have_no_correlation():
    found = distance_correlation(torch.eye(2), torch.arange(2), num_resamples=10)
    assert np.isnan([found.estimate, found.low, found.high]).all()


def test_bootstrap_equals_resampled_pairs():
    affinity, positions = noisy(9, 4)
    found = distance_correlation(affinity, positions, num_resamples=1, seed=8)
    i, j = np.triu_indices(9, 1)
    x = scipy.stats.rankdata(affinity.numpy()[i, j])
    y = scipy.stats.rankdata(np.abs(positions.numpy()[i] - positions.numpy()[j]))
    drawn = torch.randint(9, (1, 9), generator=keyed_generator(8, "affinity-bootstrap"))
    counts = np.bincount(drawn[0].numpy(), minlength=9)
    repeats = counts[i] * counts[j]
    expected = np.corrcoef(np.repeat(x, repeats), np.repeat(y, repeats))[0, 1]
    assert found.low == found.high == pytest.approx(expected, abs=1e-12)
