"""The placebo: sizes of real clusters, timesteps dealt out at random."""

import pytest
import torch

from ant_lightning import ConfigError, ShuffledClustering, SNRClustering, TimestepClusters
from ant_lightning.tasks.shuffled import ShuffledClusters

LOG_SNR = torch.linspace(9, -9, 100) ** 3


def test_sizes_stay_and_neighbours_part():
    real, placebo = SNRClustering(4)(LOG_SNR), ShuffledClustering(SNRClustering(4))(LOG_SNR)
    assert torch.equal(real.sizes, placebo.sizes)
    tasks = placebo.task_of(torch.arange(100))
    assert torch.equal(torch.bincount(tasks), real.sizes)
    assert (tasks.diff() != 0).sum() > 30  # contiguous clusters change 3 times
    assert ShuffledClustering(SNRClustering(4))(LOG_SNR) == placebo
    assert ShuffledClustering(SNRClustering(4), seed=1)(LOG_SNR) != placebo


@pytest.mark.parametrize("allocation", ["equal", "proportional"])
def test_what_is_drawn_for_a_task_belongs_to_it(allocation):
    clusters = ShuffledClustering(SNRClustering(4))(LOG_SNR)
    generator = torch.Generator().manual_seed(0)
    timesteps, tasks = clusters.sample(4000, generator=generator, allocation=allocation)
    assert torch.equal(clusters.task_of(timesteps), tasks)
    assert len(timesteps.unique()) == 100
    shares = torch.bincount(tasks) / 4000
    expected = clusters.sizes / 100 if allocation == "proportional" else torch.full((4,), 0.25)
    torch.testing.assert_close(shares, expected, atol=1e-3, rtol=0)


def test_the_identity_is_the_clusters_themselves():
    plain, same = TimestepClusters((0, 3, 9)), ShuffledClusters((0, 3, 9), tuple(range(9)))
    assert torch.equal(plain.task_of(torch.arange(9)), same.task_of(torch.arange(9)))


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match=r"order: must be a permutation of 0 .. 2"):
        ShuffledClusters((0, 1, 3), (0, 1, 1))
    with pytest.raises(ConfigError, match=r"timesteps: must be in 0 .. 2, found 0 .. 3"):
        ShuffledClusters((0, 1, 3), (2, 0, 1)).task_of(torch.tensor([0, 3]))
