"""Draws of a global batch are the same however many ranks share it."""

import pytest
import torch

from ant_lightning.modules.draws import spread_order, step_noise

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
