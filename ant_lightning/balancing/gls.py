"""GLS: the geometric mean of the task losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.objective import ObjectiveBalancer
from ant_lightning.errors import check_finite

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class GLS(ObjectiveBalancer):
    """The geometric mean of the task losses, `(prod_i L_i)^(1/k)`, of the tasks with samples.

    The weight of a task is the mean divided by `k L_i`: 1/k each for equal losses.

    Args:
        num_tasks: Number of tasks `k`.
        min_loss: Loss below which a task's weight stops growing.

    Raises:
        ConfigError: If `min_loss` is negative or not finite.

    Reference:
        Chennupati et al., "MultiNet++", equation 4, arXiv 1904.08492.

    Examples:
        >>> balancer = GLS(num_tasks=2)
        >>> losses = torch.tensor([1.0, 4.0])
        >>> balancer(losses).round(decimals=3), balancer.derivative(losses).round(decimals=3)
        (tensor(2.), tensor([1.0000, 0.2500]))
    """

    def __init__(self, num_tasks: int, *, min_loss: float = 1e-8) -> None:
        super().__init__(num_tasks)
        check_finite(0, min_loss=min_loss)
        self.min_loss = min_loss

    def forward(self, task_losses: Float[Tensor, " k"]) -> Float[Tensor, ""]:
        """The geometric mean of the losses `[k]` that are not NaN."""
        self._check_tasks(task_losses, "task_losses", 1)
        known = ~task_losses.isnan()
        bounded = task_losses.detach().clamp(min=self.min_loss)
        logs = torch.where(known, bounded, 1).log()
        mean = (logs.sum() / known.sum()).exp()
        # The value is the mean, and its slope in each loss `mean / (k max(L, min_loss))`.
        slopes = torch.where(known, mean / (known.sum() * bounded), 0)
        losses = torch.where(known, task_losses, 0)
        return mean + (slopes * (losses - losses.detach())).sum()
