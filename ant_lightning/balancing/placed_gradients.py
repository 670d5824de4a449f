"""Task gradients for ranks that have samples of few tasks: only the gradients of these are sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ant_lightning.balancing.reduced_gradients import ReducedTaskGradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class PlacedTaskGradients(ReducedTaskGradients):
    """As `ReducedTaskGradients`, but a rank sends only gradients of tasks that it has samples of.

    With `N` ranks, a rank with `m` tasks sends `(N - 1) / N (m + 1) p` numbers in total. A ring
    all-reduce of one gradient sends `(N - 1) / N 2 p`: as much as one task, and two tasks send 1.5
    times that. If the batch of all ranks is sorted by task and cut into equal slices, `N >= k`
    ranks have at most two tasks each.

    The result is correct for any distribution of samples. With every task on every rank this class
    sends as many bytes as `ReducedTaskGradients`.

    Args:
        num_tasks: `k`.
        parameters: The shared parameters, `p` numbers in all.
        reduction: How sums over ranks are made.
    """

    def _begun(self, samples: Tensor | None, sample_tasks: Tensor | None) -> None:
        """Note who has samples of each task."""
        assert samples is not None, "begin needs the samples of each rank"
        columns = samples.cpu().T
        self._of_task: list[list[int]] = [each.nonzero().flatten().tolist() for each in columns]
        super()._begun(samples, sample_tasks)

    def _holders(self, task: int) -> Sequence[int]:
        return self._of_task[task]
