"""Costs weighted by a density: the sums as defined, and what they change."""

import numpy as np
import pytest
import torch

from ant_lightning import (
    ConfigError,
    FlowMatching,
    GradientClustering,
    LogitNormal,
    ShuffledClustering,
    SNRClustering,
    TimestepClustering,
    affinity_costs,
    snr_costs,
    timestep_costs,
)


def test_weighted_costs_are_the_sums_as_defined():
    generator = torch.Generator().manual_seed(0)
    log_snr, weights = torch.rand(2, 7, generator=generator, dtype=torch.float64)
    factors = (weights / weights.mean()).numpy()
    affinity = torch.rand(7, 7, generator=generator, dtype=torch.float64)
    by_affinity = affinity_costs(affinity, weights=weights)
    by_time, by_snr = timestep_costs(7, weights=weights), snr_costs(log_snr, weights=weights)
    for left in range(7):
        for right in range(left, 7):
            centre, part = (left + right + 1) // 2, np.arange(left, right + 1)
            time = (factors[part] * (part - centre) ** 2).sum()
            assert float(by_time[left, right]) == pytest.approx(time, rel=1e-12)
            snr = (factors[part] * (log_snr[part] - log_snr[centre]).abs().numpy()).sum()
            assert float(by_snr[left, right]) == pytest.approx(snr, rel=1e-12)
            agree = -(factors[part] * affinity[centre, part].numpy()).sum()
            assert float(by_affinity[left, right]) == pytest.approx(agree, rel=1e-12)


def test_equal_weights_change_nothing():
    log_snr, ones = torch.linspace(5, -5, 60).double(), torch.ones(60)
    assert torch.equal(snr_costs(log_snr, weights=ones), snr_costs(log_snr))
    assert torch.equal(timestep_costs(60, weights=ones), timestep_costs(60))
    affinity = torch.rand(60, 60)
    assert torch.equal(affinity_costs(affinity, weights=ones), affinity_costs(affinity))


def by_affinity(num_tasks, *, weighted=False):
    """Affinity that falls evenly with the distance of cells."""
    cells = torch.arange(200.0)
    affinity = 1 - (cells[:, None] - cells).abs() / 200
    return GradientClustering(affinity, num_tasks, weighted=weighted)


@pytest.mark.parametrize("kind", [TimestepClustering, SNRClustering, by_affinity])
def test_a_weighted_clustering_cuts_finer_where_training_draws(kind):
    process = FlowMatching(density=LogitNormal(0.0, 0.5), num_timesteps=200)
    plain = kind(num_tasks=5)
    assert plain.with_density(process.density) is plain
    weighted = kind(num_tasks=5, weighted=True).with_density(process.density)
    masses = weighted(process.log_snr).masses(process.density)
    assert float(masses.min()) > float(plain(process.log_snr).masses(process.density).min())
    shuffled = ShuffledClustering(kind(num_tasks=5, weighted=True))
    found = shuffled.with_density(process.density)(process.log_snr)
    assert found.boundaries == weighted(process.log_snr).boundaries


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SNRClustering(weighted=True)(torch.linspace(5, -5, 10)),
            "weighted: needs the density",
        ),
        (
            lambda: GradientClustering(torch.eye(5), 2, weighted=True)(torch.linspace(5, -5, 5)),
            "weighted: needs the density",
        ),
        (lambda: timestep_costs(3, weights=torch.ones(2)), "weights: must be 3 finite numbers"),
        (
            lambda: snr_costs(torch.arange(3.0), weights=torch.tensor([1.0, -1.0, 1.0])),
            "weights: .*found shape .* smallest of -1.0",
        ),
    ],
)
def test_bad_weights_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
