"""Factors in place of gradients: on one process, and gathered from ranks."""

import pytest
import torch
from rank_processes import run_ranks
from torch import nn

from ant_lightning.balancing.gradients import DenseTaskGradients
from ant_lightning.balancing.placed_gradients import PlacedTaskGradients
from ant_lightning.balancing.reduced_gradients import ReducedTaskGradients
from ant_lightning.balancing.reduction import GroupReduction, Reduction, default_reduction
from ant_lightning.balancing.weight_factors import has_small_factors

K = 3
SAMPLES = [[2, 0, 0], [1, 2], [0], [1, 1, 0, 2]]  # tasks of each rank's samples
SHAPES = [(5,), (4, 6), (7, 3, 1, 1), (6, 2)]
FACTORED = {1: 2, 2: 1}  # positions for each sample
WEIGHTS = torch.tensor([0.5, -1.0, 2.0])


def parameters():
    made = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    made[1] = nn.Parameter(made[1].detach().T.contiguous().T)
    return made


def factors(index, rank, step):
    """Of the samples of one rank; no loss of rank 1 depends on parameter 2."""
    generator = torch.Generator().manual_seed(100 * step + 10 * index + rank)
    positions = FACTORED[index] * len(SAMPLES[rank])
    rows, columns = SHAPES[index][:2]
    left = torch.randn(positions, rows, generator=generator).double()
    return left * (index == 1 or rank != 1), torch.randn(
        positions, columns, generator=generator
    ).double()


def blocks(index, rank, step):
    """Gradients of the tasks that a rank has, `[k, *shape]`."""
    if index in FACTORED:
        left, right = factors(index, rank, step)
        tasks = torch.tensor(SAMPLES[rank]).repeat_interleave(FACTORED[index])
        found = [left[tasks == task].T @ right[tasks == task] for task in range(K)]
        return torch.stack(found).view(K, *SHAPES[index])
    generator = torch.Generator().manual_seed(100 * step + 10 * index + rank)
    return torch.randn(K, *SHAPES[index], generator=generator).double()


def steps(rank, world_size, kind, reduction):
    """Two steps with factors, and one without."""
    ours = parameters()
    rows = kind(K, ours, reduction=reduction)
    samples = torch.stack([torch.tensor(s).bincount(minlength=K) for s in SAMPLES[:world_size]])
    found = []
    for step in range(3):
        with_factors = FACTORED if step < 2 else {}
        rows.begin(samples=samples, factored=with_factors, sample_tasks=torch.tensor(SAMPLES[rank]))
        for index in (3, 2, 1, 0) if rank % 2 == 0 else (0, 1, 2, 3):
            if index not in with_factors:
                present = torch.tensor(SAMPLES[rank]).unique()
                zero_elsewhere = torch.zeros(K, *SHAPES[index], dtype=torch.float64)
                zero_elsewhere[present] = blocks(index, rank, step)[present]
                rows.receive(index, zero_elsewhere)
            elif index == 1 or rank != 1:
                rows.receive_factors(index, *factors(index, rank, step))
        gramian = rows.gramian()
        rows.combine_(WEIGHTS, scale=0.5)
        found.append((gramian, [p.grad for p in ours]))
        assert all(p.grad.stride() == p.stride() for p in ours)
        rows.release()
        for p in ours:
            p.grad = None
    return found


def on_ranks(rank, world_size):
    class Counted(GroupReduction):
        sent = 0

        def all_gather_parts_(self, parts):
            self.sent += parts[self.rank].numel() * (self.world_size - 1)
            return super().all_gather_parts_(parts)

        def all_gather_(self, full):
            before = self.sent
            wait = super().all_gather_(full)
            self.sent = before
            return wait

    counted = Counted()
    outcomes = steps(rank, world_size, ReducedTaskGradients, counted)
    placed = steps(rank, world_size, PlacedTaskGradients, default_reduction())
    return outcomes, placed, counted.sent


def expected(world_size, step):
    matrix = torch.zeros(K, sum(torch.Size(shape).numel() for shape in SHAPES)).double()
    for rank in range(world_size):
        present = torch.tensor(SAMPLES[rank]).unique()
        of_rank = torch.cat([blocks(i, rank, step).flatten(1) for i in range(4)], 1)
        matrix[present] += of_rank[present]
    return matrix @ matrix.T, 0.5 * WEIGHTS.double() @ matrix


def assert_right(found, world_size):
    for step, (gramian, grads) in enumerate(found):
        inner, combined = expected(world_size, step)
        torch.testing.assert_close(gramian, inner, rtol=1e-12, atol=1e-12)
        flat = torch.cat([g.reshape(-1) for g in grads])
        torch.testing.assert_close(flat, combined, rtol=1e-12, atol=1e-12)


def test_one_process():
    assert_right(steps(0, 1, DenseTaskGradients, Reduction()), 1)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_gather_factors_and_agree_to_the_last_bit(tmp_path, world_size):
    ranks = run_ranks(on_ranks, world_size, tmp_path, world_size)
    for rank, (outcomes, placed, sent) in enumerate(ranks):
        assert_right(outcomes, world_size)
        assert_right(placed, world_size)
        for (_, grads), (_, first) in zip(outcomes, ranks[0][0], strict=True):
            assert all(map(torch.equal, grads, first))
        # Two steps; a position has both factors.
        each = sum(n * sum(SHAPES[index][:2]) for index, n in FACTORED.items())
        assert sent == 2 * each * len(SAMPLES[rank]) * (world_size - 1)


def test_factors_are_small_if_they_are_few():
    weight = torch.empty(96, 64)
    assert has_small_factors(38, weight)  # 38 * 160 numbers, and 6144 of a gradient
    assert not has_small_factors(39, weight)
    assert not has_small_factors(0, weight)
    assert not has_small_factors(257, torch.empty(4096, 4096))
