"""IMTL-L: a learned scale for each task loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ant_lightning.balancing.base import LossBalancer
from ant_lightning.errors import check_above

if TYPE_CHECKING:
    from jaxtyping import Float


class IMTLL(LossBalancer):
    """IMTL-L: a learned scale for each task, `objective = 1/k sum_i (exp(s_i) L_i - s_i)`.

    For a fixed loss the optimum is `exp(s_i) = 1 / L_i`, where all scaled losses are equal. It is
    `UncertaintyWeighting` with the opposite sign of the parameter, twice the objective, and
    another start.

    Args:
        num_tasks: Number of tasks `k`.
        lr: Learning rate of `log_scales`, read when the optimizer's groups are made.

    Raises:
        ConfigError: If `lr` is not above 0.

    Reference:
        Liu et al., "Towards Impartial Multi-task Learning", section 3.2, ICLR 2021; there the sum
        over tasks.

    Examples:
        >>> IMTLL(num_tasks=2)(torch.tensor([1.0, 4.0]))
        tensor(2.5000, grad_fn=<DivBackward0>)
    """

    def __init__(self, num_tasks: int, *, lr: float = 0.025) -> None:
        super().__init__(num_tasks)
        check_above(0, lr=lr)
        self.lr = lr
        self.log_scales = nn.Parameter(torch.zeros(num_tasks, dtype=torch.float32))

    def forward(self, task_losses: Float[Tensor, " k"]) -> Float[Tensor, ""]:
        """The objective of the task losses `[k]`."""
        self._check_tasks(task_losses, "task_losses", 1)
        losses = task_losses.to(torch.promote_types(task_losses.dtype, torch.float32))
        scales = self.log_scales.to(losses.device)
        return (scales.exp() * losses - scales).sum() / self.num_tasks

    def loss_weights(self) -> Float[Tensor, " k"]:
        """`exp(s_i) / k`, `[k]` float32, detached."""
        return self.log_scales.detach().exp() / self.num_tasks
