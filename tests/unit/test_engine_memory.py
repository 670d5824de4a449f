"""How long rows are held, and what the engines need beside them."""

import weakref

import pytest
import tiny_digits
import torch
from engine_problems import EQUAL, NETWORKS, Problem
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ant_lightning.balancing import (
    Loop,
    LowMemory,
    NashMTL,
    OnePass,
    PCGrad,
    multitask_backward,
    task_gradients,
)
from ant_lightning.modules.row_buffers import engine_and_rows


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        key = storage._cdata
        if key in self._seen or not storage.nbytes():
            return
        self._seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key, size):
        self._seen.discard(key)
        self.now -= size


def peak(num_tasks, balancer, engine):
    """Peak bytes of a call on a wide network with few activations, and those of its parameters."""
    torch.manual_seed(0)
    network = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)], nn.Linear(256, 1024))
    x, tasks = torch.randn(16, 256), torch.arange(16) % num_tasks
    parameters = list(network.parameters())

    def losses(rows):
        return network(x[rows]).square().mean(1)

    with LiveBytes() as live:
        multitask_backward(losses, tasks, parameters, balancer, num_tasks=num_tasks, engine=engine)
    return live.peak, 4 * sum(p.numel() for p in parameters)


@pytest.mark.parametrize("num_tasks", [2, 16])
@pytest.mark.parametrize("engine", [LowMemory, OnePass])  # here, layers meet one position
def test_few_positions_need_less_than_one_row_more_than_vanilla(engine, num_tasks):
    vanilla, row = peak(num_tasks, None, None)
    found, _ = peak(num_tasks, PCGrad(num_tasks), engine())
    rows, _ = peak(num_tasks, PCGrad(num_tasks), Loop())
    assert vanilla >= row
    assert found <= vanilla + row
    assert rows > num_tasks * row


def test_rows_of_the_last_step_are_gone_before_the_next_are_made():
    problem = Problem(NETWORKS["dit"], EQUAL)
    problem.run(Loop())
    plain, left = problem.losses, []

    def losses(rows):
        left.extend(p for p in problem.network.parameters() if p.grad is not None)
        return plain(rows)

    problem.losses = losses
    problem.run(Loop())
    assert not left


def test_a_combination_is_the_last_use_of_rows():
    problem = Problem(NETWORKS["dit"], EQUAL)
    rows = task_gradients(problem.losses, EQUAL, list(problem.network.parameters()), num_tasks=3)
    assert rows.gramian().shape == (3, 3)
    rows.combine_(torch.ones(3))
    for use in (rows.gramian, rows.rows, lambda: rows.combine_(torch.ones(3))):
        with pytest.raises(AssertionError, match="combine_"):
            use()


@pytest.mark.parametrize("placement", ["spread", "sorted"])
@pytest.mark.parametrize(("every", "held"), [(1, True), (2, False)])
def test_rows_are_held_where_every_step_needs_them(every, held, placement):
    model = tiny_digits.module(
        balancer=NashMTL(3, update_every=every), engine="loop", placement=placement
    )
    engine, rows = engine_and_rows(model)
    x, t = torch.randn(6, *model.image_shape), torch.arange(6)

    def losses(rows):
        return (model.backbone(x[rows], t[rows], t[rows]) - 1).square().mean((1, 2, 3))

    parameters = [p for p in model.backbone.parameters() if p.requires_grad]
    multitask_backward(losses, t % 3, parameters, model.balancer, engine=engine, gradients=rows)
    buffers = [value for value in vars(rows).values() if isinstance(value, torch.Tensor)]
    most = max(buffer.numel() for buffer in buffers)
    assert most >= 3 * sum(p.numel() for p in parameters) if held else most == 0
    assert all(p.grad is not None for p in parameters)
