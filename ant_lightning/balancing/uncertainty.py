"""Uncertainty weighting: a learned log-variance for each task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ant_lightning.balancing.base import LossBalancer
from ant_lightning.errors import check_above, check_finite

if TYPE_CHECKING:
    from jaxtyping import Float


class UncertaintyWeighting(LossBalancer):
    """A learned log-variance for each task: `objective = sum_i 1/2 (exp(-s_i) L_i / k + s_i)`.

    For a fixed loss the optimum is `exp(s_i) = L_i / k`. There the weight `exp(-s_i) / (2 k)` of
    the task is `1 / (2 L_i)`, which diverges as the loss goes to 0. With `min_loss = m` the
    log-variances are fitted to `max(L_i, m)`, so they settle at `log(m / k)` or above. The weights
    use `max(s_i, log(m / k))`, so no weight exceeds `1 / (2 m)`.

    `log_vars` starts at 0 and stays in float32. It belongs in a parameter group of its own,
    without weight decay and outside gradient clipping and EMA.

    Args:
        num_tasks: Number of tasks `k`.
        lr: Learning rate of `log_vars`, read when the optimizer's groups are made.
        min_loss: Loss below which a task's weight stops growing; 0 for no bound (official). The
            default only prevents an overflow for a task whose loss is 0.

    Raises:
        ConfigError: If `lr` is not above 0, or `min_loss` negative or not finite.

    Reference:
        Kendall et al., "Multi-Task Learning Using Uncertainty to Weigh Losses", arXiv 1705.07115;
        form and learning rate of the official code of arXiv 2306.00354.

    Examples:
        >>> balancer = UncertaintyWeighting(num_tasks=2)
        >>> balancer.loss_weights()
        tensor([0.2500, 0.2500])
        >>> objective, (gradient,) = balancer.differentiate(torch.tensor([1.0, 4.0]))
        >>> gradient
        tensor([ 0.2500, -0.5000])
    """

    def __init__(self, num_tasks: int, *, lr: float = 0.025, min_loss: float = 1e-8) -> None:
        super().__init__(num_tasks)
        check_above(0, lr=lr)
        self.lr = lr
        check_finite(0, min_loss=min_loss)
        self.min_loss = min_loss
        self.log_vars = nn.Parameter(torch.zeros(num_tasks, dtype=torch.float32))

    def forward(self, task_losses: Float[Tensor, " k"]) -> Float[Tensor, ""]:
        """The objective of the task losses `[k]`."""
        self._check_tasks(task_losses, "task_losses", 1)
        losses = task_losses.to(torch.promote_types(task_losses.dtype, torch.float32))
        log_vars = self.log_vars.to(losses.device)
        fitted = losses.detach().clamp(min=self.min_loss)
        own = (-log_vars).exp() * fitted / (2 * self.num_tasks)
        # `own - own.detach()` is 0: it only gives `log_vars` its gradient. `loss_weights` is
        # detached and bounded, and gives the losses theirs.
        weights = self.loss_weights().to(losses)
        return (weights * losses + log_vars / 2 + (own - own.detach())).sum()

    @torch.no_grad()
    def differentiate(
        self, task_losses: Float[Tensor, " k"]
    ) -> tuple[Float[Tensor, ""], list[Tensor]]:
        """The objective and `d objective / d s_i = 1/2 (1 - exp(-s_i) max(L_i, m) / k)`.

        On a GPU the cost is that of kernel launches, and the closed form needs fewer of them than
        autograd. A subclass with a `forward` of its own uses autograd.
        """
        if type(self).forward is not UncertaintyWeighting.forward:
            return super().differentiate(task_losses)
        objective = torch.add(self.loss_weights() * task_losses, self.log_vars, alpha=0.5).sum()
        fitted = (-self.log_vars).exp() * task_losses.clamp(min=self.min_loss)
        # rsub(x, 1/2, alpha=a) = 1/2 - a x, in one kernel.
        slope = torch.rsub(fitted, 0.5, alpha=1 / (2 * self.num_tasks))
        return objective, [slope] if self.log_vars.requires_grad else []

    def loss_weights(self) -> Float[Tensor, " k"]:
        """`exp(-s_i) / (2 k)`, at most `1 / (2 min_loss)`: `[k]` float32, detached."""
        log_vars = self.log_vars.detach()
        if self.min_loss > 0:
            log_vars = log_vars.clamp(min=math.log(self.min_loss / self.num_tasks))
        return (-log_vars).exp() / (2 * self.num_tasks)
