"""Task gradients without rows: the Gramian first, then a second backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.buckets import ArrivalOrder, memory_strides
from ant_lightning.balancing.engines import Engine
from ant_lightning.balancing.gradients import TaskGradients, assign_gradients, reduce_gradients_
from ant_lightning.balancing.one_pass.engine import OnePass, SortedLosses
from ant_lightning.balancing.products import dot_products

if TYPE_CHECKING:
    from collections.abc import Collection

    from jaxtyping import Float
    from torch import Tensor

    from ant_lightning.balancing.gradients import DenseTaskGradients
    from ant_lightning.balancing.task_batch import TaskBatch


class LowMemory(Engine):
    """The Gramian parameter by parameter, then the same graph differentiated once more.

    One forward and two backward passes over the whole batch, and no rows: the gradients of the
    tasks for one parameter are added to the Gramian and dropped. The activations stay until the
    second backward pass. A compiled network gives the gradients of all its parameters at once, so
    there it saves memory only if it is compiled block by block. The network must meet the
    conditions of `OnePass`. With several ranks the gradients of all tasks are all-reduced, which
    with the combination sends `k + 1` times the bytes of one gradient.
    """

    def __init__(self) -> None:
        self._one_pass = OnePass()
        self._order: ArrivalOrder | None = None  # in which ranks sum their gradients

    def task_gradients(
        self, batch: TaskBatch, rows: DenseTaskGradients | None = None
    ) -> TaskGradients:
        """The Gramian, and the graph for the second pass.

        Raises:
            UnsupportedError: If the network does not fit.
            ConfigError: If the batch is to be computed in parts.
        """
        losses = self._one_pass.prepare(batch)
        with losses.watched():
            values = batch.evaluate(losses.rows)
        if self._order is None or len(self._order.indices) != len(batch.shared):
            self._order = ArrivalOrder(len(batch.shared), batch.reduction)
        found = _StreamedTaskGradients(losses, values, self._order)
        batch.record(losses.rows, values)
        return found


class _StreamedTaskGradients(TaskGradients):
    """A Gramian, and the losses; the combination differentiates them again."""

    def __init__(self, losses: SortedLosses, values: Tensor, order: ArrivalOrder) -> None:
        self._losses: SortedLosses | None = losses
        self._values: Tensor | None = values
        batch = losses.batch
        k, device = batch.num_tasks, batch.shared[0].device
        self._gramians = torch.zeros(len(batch.shared), k, k, dtype=torch.float64, device=device)
        self._present = torch.tensor(losses.tasks).to(device, non_blocking=True)

        # On several ranks a gradient waits until those before it in the order have been summed:
        # a parameter may have none on some rank.
        order.agree(device)
        order.begin()
        self._order, self._next = order, 0
        self._waiting: dict[int, Tensor] = {}
        with losses.watched():
            losses.differentiate(values, losses.mean_weights(), self, retain_graph=True)
        if batch.reduction.world_size > 1:
            self._sum_over_ranks(every=True)

    def receive(self, index: int, block: Tensor) -> None:
        """Add the dot products of one parameter's gradients to the Gramian."""
        assert self._losses is not None
        batch, present = self._losses.batch, self._present
        flat = block.reshape(len(block), -1).to(torch.promote_types(block.dtype, torch.float32))
        if batch.reduction.world_size > 1:
            flat = flat.new_zeros(batch.num_tasks, flat.shape[1]).index_copy_(0, present, flat)
            self._waiting[index] = flat
            self._order.arrived(index)
            self._sum_over_ranks()
        else:
            self._gramians[index][present[:, None], present] = dot_products(flat)

    def _sum_over_ranks(self, *, every: bool = False) -> None:
        """Sum what has arrived, in order; with `every`, what has not is zero."""
        assert self._losses is not None
        batch, order = self._losses.batch, self._order.indices
        while self._next < len(order) and (every or order[self._next] in self._waiting):
            index, self._next = order[self._next], self._next + 1
            flat = self._waiting.pop(index, None)
            if flat is None:
                p = batch.shared[index]
                dtype = torch.promote_types(p.dtype, torch.float32)
                flat = p.new_zeros(batch.num_tasks, p.numel(), dtype=dtype)
            self._gramians[index] = dot_products(batch.reduction.all_reduce_(flat))

    def receive_factors(self, index: int, left: Tensor, right: Tensor) -> None:
        """Not called: no weight is factored."""
        raise AssertionError

    def gramian(self, of: Collection[int] | None = None) -> Float[Tensor, "k k"]:
        """`G[i, j] = g_i . g_j`, float64, over the samples of all ranks."""
        found = self._gramians if of is None else self._gramians[[*of]]
        return found.sum(0)

    def combine_(self, task_weights: Float[Tensor, " k"], *, scale: Tensor | float = 1.0) -> None:
        """Write `scale * sum_i task_weights[i] g_i` into every parameter's `.grad`, once."""
        losses, values = self._losses, self._values
        assert losses is not None, "combine_ was called after release"
        assert values is not None
        batch = losses.batch
        for p in batch.shared:
            p.grad = None
        weights = task_weights.to(batch.num_samples) / batch.num_samples.clamp(min=1)
        sums = _Sums(batch)
        with losses.watched():
            losses.differentiate(values, batch.per_sample(weights, losses.rows), sums)
        if isinstance(scale, torch.Tensor) or scale != 1.0:
            torch._foreach_mul_(sums.gradients, scale)
        assign_gradients(batch.shared, sums.gradients)
        reduce_gradients_(batch.shared, reduction=batch.reduction)

    def release(self) -> None:
        """Free the graph and the activations."""
        self._losses = self._values = None


class _Sums:
    """The sum over tasks of each parameter's gradients, zero for those without one."""

    def __init__(self, batch: TaskBatch) -> None:
        # In the memory layouts of the parameters, which optimizers want.
        self.gradients = [
            torch.empty_strided(
                p.shape,
                memory_strides(p),
                dtype=torch.promote_types(p.dtype, torch.float32),
                device=p.device,
            ).zero_()
            for p in batch.shared
        ]

    def receive(self, index: int, block: Tensor) -> None:
        """Sum the gradients of one parameter."""
        self.gradients[index].copy_(block.sum(0, dtype=self.gradients[index].dtype))

    def receive_factors(self, index: int, left: Tensor, right: Tensor) -> None:
        """Not called: no weight is factored."""
        raise AssertionError
