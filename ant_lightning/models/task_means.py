"""Mean losses of tasks, summed over batches and ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchmetrics import Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn


class TaskMeans(Metric):
    """Mean loss of each task, `[k]` float64; sums over batches and ranks.

    Args:
        num_tasks: `k`.
    """

    sums: Tensor  # [2, k]: losses, samples

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        zeros = torch.zeros(2, num_tasks, dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")

    def update(self, losses: Tensor, tasks: Tensor) -> None:
        """Add the losses `[b]` of samples of `tasks` `[b]`."""
        values = torch.stack([losses.double(), torch.ones_like(losses, dtype=torch.float64)]).cpu()
        # On the CPU: on CUDA `index_add_` adds in no fixed order, so sums would not reproduce.
        added = torch.zeros(self.sums.shape, dtype=torch.float64).index_add_(1, tasks.cpu(), values)
        self.sums += added.to(self.sums.device)

    def compute(self) -> tuple[Tensor, Tensor]:
        """The mean over all samples, and that of each task (NaN for a task without samples)."""
        return self.sums[0].sum() / self.sums[1].sum(), self.sums[0] / self.sums[1]

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ""
    ) -> nn.Module:
        # Follow the module to its device, but stay float64 if the module is cast (bf16-true).
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), exclude_state)
