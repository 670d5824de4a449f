"""Uncertainty weighting: a learned log-variance for each task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ant_lightning.balancing.base import LossBalancer, check_min_loss
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["UncertaintyWeighting"]


class UncertaintyWeighting(LossBalancer):
    """`objective = sum_i 1/2 (exp(-s_i) L_i / k + s_i)` with learned `s = log_vars`.

    For a fixed loss the optimum is `exp(s_i) = L_i / k`, where the task's weight
    `exp(-s_i) / (2 k)` is `1 / (2 L_i)`: without a bound it grows beyond any limit as a loss goes
    to 0. With `min_loss = m` the log-variances are fitted to `max(L_i, m)` in place of `L_i`, so
    that they settle at `log(m / k)` and turn back from below, and the weights of the losses are
    those of `max(s_i, log(m / k))`: none is ever above `1 / (2 m)`.

    `log_vars` start at 0 and stay in float32 whatever the model is cast to. They belong in a
    parameter group of their own, without weight decay and outside gradient clipping and EMA.

    Args:
        num_tasks: `k`.
        lr: Learning rate of the log-variances, for whoever makes the optimizer's groups.
        min_loss: Loss below which a task's weight grows no more; 0 for no bound (official). The
            default keeps the weights of a task without any loss from overflowing.

    Raises:
        ConfigError: If `lr` is not above 0, or `min_loss` negative or not finite.

    Reference:
        Kendall et al., "Multi-Task Learning Using Uncertainty to Weigh Losses", arXiv 1705.07115;
        form and learning rate of the official code of arXiv 2306.00354.
    """

    def __init__(self, num_tasks: int, *, lr: float = 0.025, min_loss: float = 1e-8) -> None:
        super().__init__(num_tasks)
        if not lr > 0:
            raise ConfigError(f"lr: must be above 0, found {lr}")
        self.lr = lr
        self.min_loss = check_min_loss(min_loss)
        self.log_vars = nn.Parameter(torch.zeros(num_tasks, dtype=torch.float32))

    def forward(self, task_losses: Float[Tensor, " k"]) -> Float[Tensor, ""]:
        """The objective of the task losses `[k]`."""
        self._check_tasks(task_losses, "task_losses", 1)
        losses = task_losses.to(torch.promote_types(task_losses.dtype, torch.float32))
        log_vars = self.log_vars.to(losses.device)
        fitted = losses.detach().clamp(min=self.min_loss)
        own = (-log_vars).exp() * fitted / (2 * self.num_tasks)
        # The value of `own` is taken off again: it is there for the gradient of s alone.
        weights = self.loss_weights().to(losses)
        return (weights * losses + log_vars / 2 + (own - own.detach())).sum()

    @torch.no_grad()
    def differentiate(
        self, task_losses: Float[Tensor, " k"]
    ) -> tuple[Float[Tensor, ""], list[Tensor]]:
        """The objective and `d objective / d s_i = 1/2 (1 - exp(-s_i) max(L_i, m) / k)`.

        In fewer calls than autograd makes, whose number is what they take on a GPU. A subclass
        with a `forward` of its own is left to autograd.
        """
        if type(self).forward is not UncertaintyWeighting.forward:
            return super().differentiate(task_losses)
        objective = torch.add(self.loss_weights() * task_losses, self.log_vars, alpha=0.5).sum()
        fitted = (-self.log_vars).exp() * task_losses.clamp(min=self.min_loss)
        slope = torch.rsub(fitted, 0.5, alpha=1 / (2 * self.num_tasks))
        return objective, [slope] if self.log_vars.requires_grad else []

    def loss_weights(self) -> Float[Tensor, " k"]:
        """`exp(-s_i) / (2 k)`, at most `1 / (2 min_loss)`: `[k]` float32, detached."""
        log_vars = self.log_vars.detach()
        if self.min_loss > 0:
            log_vars = log_vars.clamp(min=math.log(self.min_loss / self.num_tasks))
        return (-log_vars).exp() / (2 * self.num_tasks)
