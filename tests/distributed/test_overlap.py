"""Gradients that travel while the backward pass goes on: order, uses, and what is missing."""

import pytest
import torch
from rank_processes import run_ranks
from torch import nn

from ant_lightning.balancing import overlap, reduced_gradients
from ant_lightning.balancing.differentiation import Differentiation
from ant_lightning.balancing.gradients import DenseTaskGradients
from ant_lightning.balancing.placed_gradients import PlacedTaskGradients
from ant_lightning.balancing.reduced_gradients import ReducedTaskGradients
from ant_lightning.balancing.reduction import GroupReduction, Reduction, default_reduction

SHAPES = {"a": (3, 4), "b": (3, 4), "twice": (4, 2), "one_rank": (2,), "never": (5,)}
X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Registered in another order than gradients arrive in; `a + b` gives both one tensor."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape).to(dtype)))

    def losses(self, x, *, with_all=True):
        h = torch.tanh(x.to(self.a.dtype) @ (self.a + self.b)) @ self.twice
        h = h @ self.twice.T @ self.twice
        return (h * self.one_rank if with_all else h).square().sum()


class Noted(GroupReduction):
    """Notes the sizes of sums when they start."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def start_all_reduce_(self, tensor):
        self.notes.append(tensor.numel())
        return super().start_all_reduce_(tensor)


def whole_gradients(rank):
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        network, reduction = Network(dtype), Noted()
        overlap._BYTES = overlap._FIRST_BYTES = 4 * max(4, dtype.itemsize)  # 4 numbers
        parameters = [*network.parameters()]
        network.a.register_hook(lambda _, notes=reduction.notes: notes.append("a arrives"))
        step = Differentiation(parameters, reduction)
        for number in range(3):
            reduction.notes.clear()
            # Rank 0 has two passes; rank 1 has one, which lacks a parameter.
            if rank == 0:
                before = step.gradients(network.losses(X[:1]))
                last = network.losses(X[1:2])
            else:
                before, last = [], network.losses(X[2:], with_all=False)
            norm = step.finish(step.last_gradients(last, before))
            grads = [p.grad.clone() for p in parameters]
            found[dtype, number] = grads, norm, [*reduction.notes], step.buckets.order.indices
            assert not network.b._backward_hooks
    return found


def test_buckets_leave_before_the_pass_is_over_and_hold_the_sum_over_ranks(tmp_path):
    ranks = run_ranks(whole_gradients, 2, tmp_path)
    for dtype, number in ranks[0]:
        network = Network(dtype)
        loss = network.losses(X[:1]) + network.losses(X[1:2])
        (loss + network.losses(X[2:], with_all=False)).backward()
        wanted = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
        close = {"rtol": 1e-12, "atol": 0} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1}
        for rank, outcome in enumerate(ranks):
            grads, norm, notes, order = outcome[dtype, number]
            assert all(map(torch.equal, grads, ranks[0][dtype, number][0]))
            torch.testing.assert_close(grads, wanted, **close)
            torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(grads))
            # In the first step the order is the parameters' own, backwards: `never` comes first,
            # and nothing leaves before the pass is over. Then it is that of arrival on rank 0.
            if number == 0:
                assert order == [4, 3, 2, 1, 0]
                assert notes[-4:] == [5, 10, 12, 12]
            else:
                assert order == ranks[0][dtype, 1][3]
                assert order[:2] + order[-1:] == [3, 2, 4]
                # On rank 1 the first bucket waits for a parameter that its loss does not use.
                assert notes[-1] == 5
                assert rank == 1 or notes.index(10) < notes.index("a arrives", 2)


# A large one that is sent as it is, one that needs padding, small ones, channels-last, and one
# that no task uses.
ROWS = [(8, 4), (3, 7), (2,), (1,), (4, 3, 2, 2), (6,)]
K = 3
# Tasks that each rank has samples of; their order on the rank is not ascending.
PRESENT = [[2, 0], [1], [0, 1, 2], [2]]


def parameters_of_rows(dtype=torch.float32):
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ROWS]
    made[4] = nn.Parameter(made[4].detach().to(memory_format=torch.channels_last))
    return made


def block(step, rank, index, tasks):
    """Gradients of one parameter on one rank, [len(tasks), *shape]."""
    rows = []
    for task in tasks:
        generator = torch.Generator().manual_seed(1000 * step + 100 * rank + 10 * index + task)
        rows.append(torch.randn(ROWS[index], generator=generator))
    return torch.stack(rows)


def received(rank, world_size, kind, reduction, *, apart=(), ranks=None):
    """Three steps in which blocks arrive in an order of the rank's own."""
    parameters = parameters_of_rows()
    rows = kind(K, parameters, reduction=reduction)
    samples = torch.zeros(world_size, K)
    for each in range(world_size):
        samples[each, PRESENT[each]] = 1
    found = []
    for step in range(3):
        order = [4, 0, 1, 3, 2]  # never 5
        if rank % 2:
            order.reverse()
        tasks = PRESENT[rank] if ranks is None else [2, 1, 0]
        rows.begin(tasks, samples=samples, apart=apart)
        for index in order:
            if index in apart:
                continue
            value = block(step, rank, index, tasks)
            if ranks is not None:  # one process: the sum that ranks would have
                value = torch.zeros(3, *ROWS[index])
                for each in range(ranks):
                    for task, row in zip(
                        PRESENT[each], block(step, each, index, PRESENT[each]), strict=True
                    ):
                        value[tasks.index(task)] += row
            rows.receive(index, value)
        gramian = rows.gramian()
        rows.combine_(torch.tensor([0.5, -1.0, 2.0]), scale=2.0)
        found.append((gramian, [p.grad for p in parameters]))
        assert parameters[4].grad.stride() == parameters[4].stride()
        rows.release()
        for p in parameters:
            p.grad = None
    return found


def every_kind(rank, world_size):
    reduced_gradients._ALONE = 8
    return {
        (kind.__name__, apart): received(rank, world_size, kind, default_reduction(), apart=apart)
        for kind in (ReducedTaskGradients, PlacedTaskGradients)
        for apart in ((), (0, 2))
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_blocks_that_arrive_in_any_order_have_the_gramian_and_combination_of_one_process(
    tmp_path, world_size
):
    ranks = run_ranks(every_kind, world_size, tmp_path, world_size)
    for key in ranks[0]:
        one = received(0, 1, DenseTaskGradients, Reduction(), apart=key[1], ranks=world_size)
        for rank in ranks:
            for (gramian, grads), (expected, wanted) in zip(rank[key], one, strict=True):
                torch.testing.assert_close(gramian, expected, rtol=1e-6, atol=1e-5)
                for index, (value, right) in enumerate(zip(grads, wanted, strict=True)):
                    assert (value is None) == (right is None) == (index in key[1])
                    if value is not None:
                        torch.testing.assert_close(value, right, rtol=1e-6, atol=1e-5)
        for step, (gramian, grads) in enumerate(one):
            flat = [
                sum(
                    torch.zeros(K, *ROWS[i]).index_add(
                        0, torch.tensor(PRESENT[r]), block(step, r, i, PRESENT[r])
                    )
                    for r in range(world_size)
                ).flatten(1)
                for i in range(5)
                if i not in key[1]
            ]
            matrix = torch.cat(flat, 1).double()
            torch.testing.assert_close(gramian, matrix @ matrix.T, rtol=1e-5, atol=1e-5)
            combined = torch.tensor([[1.0, -2.0, 4.0]]).double() @ matrix
            found = torch.cat([g.flatten() for g in grads[:5] if g is not None])
            torch.testing.assert_close(found.double(), combined[0], rtol=1e-5, atol=1e-5)
            if 5 not in key[1]:
                assert not grads[5].any()


def test_parameters_that_are_added_have_gradients_of_their_own():
    network = Network()
    parameters = [*network.parameters()]
    step = Differentiation(parameters, Reduction())
    step.finish(step.last_gradients(network.losses(X) + network.never.sum()))
    torch._foreach_mul_([p.grad for p in parameters], 2.0)
    expected = torch.autograd.grad(2 * network.losses(X), [network.a, network.b, network.twice])
    torch.testing.assert_close([network.a.grad, network.b.grad, network.twice.grad], [*expected])
    assert torch.equal(network.never.grad, torch.full((5,), 2.0))
