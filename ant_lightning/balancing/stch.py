"""STCH: a smooth maximum of the task losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.objective import ObjectiveBalancer
from ant_lightning.errors import check_above

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class STCH(ObjectiveBalancer):
    """Smooth Tchebycheff scalarization, `mu log sum_i exp(L_i / mu)`: a smooth maximum.

    The weights are `softmax(L / mu)`: 1/k each for equal losses, and near 1 for the largest loss
    if `mu` is small.

    Args:
        num_tasks: Number of tasks `k`.
        mu: Smoothing, in units of the loss.

    Raises:
        ConfigError: If `mu` is not above 0.

    Reference:
        Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
        equation 6, arXiv 2402.19078; here without preferences and with the ideal point 0.

    Examples:
        >>> STCH(num_tasks=2, mu=1.0).derivative(torch.tensor([1.0, 1.0]))
        tensor([0.5000, 0.5000])
    """

    def __init__(self, num_tasks: int, *, mu: float = 0.1) -> None:
        super().__init__(num_tasks)
        check_above(0, mu=mu)
        self.mu = mu

    def forward(self, task_losses: Float[Tensor, " k"]) -> Float[Tensor, ""]:
        """The smooth maximum of the losses `[k]` that are not NaN."""
        self._check_tasks(task_losses, "task_losses", 1)
        known = torch.where(task_losses.isnan(), -torch.inf, task_losses)
        return self.mu * torch.logsumexp(known / self.mu, 0)
