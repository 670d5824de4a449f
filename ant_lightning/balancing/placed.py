"""Task gradients for ranks that have samples of few tasks: only existing rows are sent."""

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

    When all rows are made, one all-to-all moves shard j of each to rank j, which adds up those of
    the same task; Gramian and combination go on as in `DenseTaskGradients`. A rank with `m` tasks
    sends `(N - 1) / N (m + 1) p` numbers in all, against `(N - 1) / N 2 p` for a ring all-reduce of
    one gradient: as much with one task, 1.5 times with two. If the batch of all ranks is sorted by
    task and cut into equal slices, `N >= k` ranks have at most two tasks each. It holds `m` rows
    twice and receives as many numbers as all ranks' rows have in one shard.

    Any distribution of samples is right; with every task on every rank it sends as many bytes as
    `DenseTaskGradients`, but cannot overlap them with the computation.

    Args:
        num_tasks: `k`.
        parameters: The shared parameters, `p` numbers in all.
        reduction: How sums over ranks are made.
    """

    def __init__(
        self, num_tasks: int, parameters: Sequence[nn.Parameter], *, reduction: Reduction
    ) -> None:
        super().__init__(num_tasks, parameters, reduction=reduction, num_full=1)
        self._slots: dict[int, int] = {}
        self._exchanged = True

    def write(self, task: int, gradients: Iterator[Sequence[Tensor]]) -> None:
        """Set this rank's part of row `task`; nothing is kept without samples of that task."""
        self._hold(self.parameters)
        if self._exchanged:
            self._slots.clear()
            self._exchanged = False
        first = next(gradients, None)
        if first is None:
            return
        slot = self._slots[task] = len(self._slots)
        self._grow(slot + 1)
        self._accumulate(slot, chain([first], gradients))

    def _spread(self, tasks: Sequence[int]) -> None:
        """Do nothing: rows are exchanged together, in `_finish`."""
        self._slots = {task: slot for slot, task in enumerate(tasks)}
        self._exchanged = False

    def _finish(self) -> None:
        """Exchange the rows once, and sum this rank's shards of each."""
        if self._exchanged:
            return
        self._exchanged = True
        ranks, length = self.reduction.world_size, self._shards.shape[1]
        held = torch.zeros(ranks, self.num_tasks, device=self._full.device)
        held[self.reduction.rank, list(self._slots)] = 1
        on_host = self.reduction.all_reduce_(held).cpu()
        tasks_of = [row.nonzero().flatten().tolist() for row in on_host]
        # Every rank sends its rows in the order of their tasks, one shard to each rank.
        mine = [self._slots[task] for task in tasks_of[self.reduction.rank]]
        sent = self._full[mine].view(len(mine), ranks, length).transpose(0, 1).reshape(-1, length)
        received = sent.new_empty(sum(map(len, tasks_of)), length)
        self.reduction.all_to_all(received, sent, [len(tasks) for tasks in tasks_of])
        order = torch.tensor([task for tasks in tasks_of for task in tasks], device=sent.device)
        self._shards.zero_().index_add_(0, order, received)
