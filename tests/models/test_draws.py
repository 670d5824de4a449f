"""Draws of a global batch are the same however many ranks share it."""

import pytest
import torch

from ant_lightning import TimestepClusters
from ant_lightning.models.draws import sample_shares, spread_order, step_noise

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_tasks", [2, 5, 8])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 6])
def test_every_part_of_the_batch_has_its_share_of_each_task(num_tasks, num_ranks):
    for size in (5, 16, 48):
        num_images = size * num_ranks
        order = spread_order(num_images)
        assert torch.equal(order.sort().values, torch.arange(num_images))
        tasks = torch.arange(num_images) * num_tasks // num_images
        for part in tasks[order].view(num_ranks, size):
            counts = part.bincount(minlength=num_tasks)
            shares = tasks.bincount(minlength=num_tasks) / num_ranks
            assert (counts - shares).abs().max() <= 2


def test_noise_of_a_part_is_that_part_of_the_noise():
    shape = (2, 3, 3)
    whole = step_noise(slice(0, 100), shape, 5, 9, CPU)
    assert whole.shape == (100, *shape)
    for start, stop in [(0, 1), (31, 33), (50, 100), (99, 100), (32, 64)]:
        part = step_noise(slice(start, stop), shape, 5, 9, CPU)
        assert torch.equal(part, whole[start:stop])
    assert abs(float(whole.std()) - 1) < 0.1
    # No image, step or seed shares its noise with another.
    flat = torch.cat([whole, step_noise(slice(0, 100), shape, 5, 10, CPU)]).flatten(1)
    flat = torch.cat([flat, step_noise(slice(0, 100), shape, 6, 9, CPU).flatten(1)])
    assert len(flat.unique(dim=0)) == 300


@pytest.mark.parametrize("allocation", ["equal", "proportional"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_shares_of_samples_make_the_mean_over_timesteps_of_batches_of_any_size(
    allocation, batch_size
):
    """Also where a cluster is missing from some batches."""
    clusters = TimestepClusters((0, 10, 40, 100))
    task_losses = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    generator, num_batches = torch.Generator().manual_seed(0), 3000
    estimates = torch.zeros(num_batches, dtype=torch.float64)
    for i in range(num_batches):
        counts = clusters.counts(batch_size, generator=generator, allocation=allocation).double()
        shares = sample_shares(clusters.sizes, counts, allocation)
        estimates[i] = (counts * shares.where(counts > 0, 0) * task_losses).sum()
    error = estimates.std() / num_batches**0.5
    assert abs(estimates.mean() - (0.1 * 1 + 0.3 * 10 + 0.6 * 100)) <= 5 * error + 1e-9
