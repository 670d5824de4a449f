"""Task gradients for ranks that have samples of few tasks: only the rows of these are sent."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.gradients import DenseTaskGradients

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from ant_lightning.balancing.reduction import Reduction

__all__ = ["PlacedTaskGradients"]


class PlacedTaskGradients(DenseTaskGradients):
    """A row for each task with samples on this rank, and this rank's shard of every row.

    When all rows are made, one all-to-all moves shard j of each row to rank j, which adds up the
    shards of the same task. Gramian and combination are those of `DenseTaskGradients`. With `N`
    ranks, a rank with `m` tasks sends `(N - 1) / N (m + 1) p` numbers in total. A ring all-reduce
    of one gradient sends `(N - 1) / N 2 p`: as much as one task, and two tasks send 1.5 times that.
    If the batch of all ranks is sorted by task and cut into equal slices, `N >= k` ranks have at
    most two tasks each.

    During the exchange a rank holds its `m` rows twice, and one shard of every rank's rows.

    The result is correct for any distribution of samples. With every task on every rank this class
    sends as many bytes as `DenseTaskGradients`, but cannot overlap them with the computation.

    Args:
        num_tasks: `k`.
        parameters: The shared parameters, `p` numbers in all.
        reduction: How sums over ranks are made.
    """

    def __init__(
        self, num_tasks: int, parameters: Sequence[nn.Parameter], *, reduction: Reduction
    ) -> None:
        super().__init__(num_tasks, parameters, reduction=reduction, num_full=1)
        self._slots: dict[int, int] = {}  # place in `_full` of the row of each task
        self._exchanged = True

    def write(self, task: int, gradients: Iterator[Sequence[Tensor]]) -> None:
        """Set this rank's part of row `task`; nothing is kept without samples of that task."""
        self._hold(self.parameters)
        if self._exchanged:  # the first row of a new step
            self._slots.clear()
            self._exchanged = False
        first = next(gradients, None)
        if first is None:
            return
        slot = self._slots[task] = len(self._slots)
        self._grow(slot + 1)
        self._accumulate(slot, chain([first], gradients))

    def _spread(self, tasks: Sequence[int]) -> None:
        """Note the places of the rows; `_finish` exchanges all of them together."""
        self._slots = {task: slot for slot, task in enumerate(tasks)}
        self._exchanged = False

    def _finish(self) -> None:
        """Exchange the rows once, and sum this rank's shards of each."""
        if self._exchanged:
            return
        self._exchanged = True
        ranks, length = self.reduction.world_size, self._shards.shape[1]
        # Which rank has rows of which tasks: an all-to-all must know how many rows it will receive.
        held = torch.zeros(ranks, self.num_tasks, device=self._full.device)
        held[self.reduction.rank, list(self._slots)] = 1
        on_host = self.reduction.all_reduce_(held).cpu()
        tasks_of = [row.nonzero().flatten().tolist() for row in on_host]
        # Every rank sends its rows in ascending order of their tasks, one shard to each rank.
        mine = [self._slots[task] for task in tasks_of[self.reduction.rank]]
        sent = self._full[mine].view(len(mine), ranks, length).transpose(0, 1).reshape(-1, length)
        received = sent.new_empty(sum(map(len, tasks_of)), length)
        self.reduction.all_to_all(received, sent, [len(tasks) for tasks in tasks_of])
        order = torch.tensor([task for tasks in tasks_of for task in tasks], device=sent.device)
        self._shards.zero_().index_add_(0, order, received)
