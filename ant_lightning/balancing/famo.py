"""FAMO: all task losses fall at about the same rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ant_lightning.balancing.base import CountsSteps
from ant_lightning.balancing.objective import ObjectiveBalancer
from ant_lightning.errors import check_above, check_at_least

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float

    from ant_lightning.balancing.step_losses import StepLosses

_EPSILON = 1e-8
_BETAS = (0.9, 0.999)


class FAMO(CountsSteps, ObjectiveBalancer):
    """FAMO: weights `c z_i / L_i` with `z = softmax(w)`, and `c` such that they sum to 1.

    After the optimizer's step, the losses of the same batch are computed once more, and `w` takes
    a step of Adam that raises the weight of tasks whose log-loss fell least. So a step costs one
    more forward pass, about a third of a step, and `MultiTaskStep.update` must be called.

    Args:
        num_tasks: Number of tasks `k`.
        lr: Learning rate of `w`.
        weight_decay: Weight decay of `w`.

    Raises:
        ConfigError: If `lr` is not above 0 or `weight_decay` negative.

    Reference:
        Liu et al., "FAMO: Fast Adaptive Multitask Optimization", algorithm 1, arXiv 2306.03792.

    Examples:
        >>> FAMO(num_tasks=2).derivative(torch.tensor([1.0, 3.0]))
        tensor([0.7500, 0.2500])
    """

    looks_back = True
    logits: Tensor
    moments: Tensor

    def __init__(self, num_tasks: int, *, lr: float = 0.025, weight_decay: float = 1e-3) -> None:
        super().__init__(num_tasks)
        check_above(0, lr=lr)
        check_at_least(0, weight_decay=weight_decay)
        # Not `lr`: the optimizer of the network must not look for parameters here.
        self.logits_lr = lr
        self.weight_decay = weight_decay
        self.register_buffer("logits", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("moments", torch.zeros(2, num_tasks, dtype=torch.float64))

    def forward(self, task_losses: Float[Tensor, " k"]) -> Float[Tensor, ""]:
        """`c sum_i z_i log L_i` over the losses `[k]` that are not NaN, with `c` held constant."""
        self._check_tasks(task_losses, "task_losses", 1)
        known = ~task_losses.isnan()
        shifted = torch.where(known, task_losses + _EPSILON, 1)
        shares = torch.where(known, self.logits.softmax(0).to(shifted), 0)
        scale = 1 / (shares / shifted).sum().detach()
        return scale * (shares * shifted.log()).sum()

    def update(self, step: StepLosses, losses_now: Callable[[], Tensor] | None = None) -> None:
        """Take a step of Adam on `w`, from the losses before and after the optimizer's step."""
        assert losses_now is not None, "FAMO was updated before the optimizer's step"
        super().update(step)
        before, after = step.shown_losses, losses_now()
        fall = (before + _EPSILON).log() - (after + _EPSILON).log()
        fall = torch.where(fall.isfinite(), fall, 0)  # also of a task without samples
        shares = self.logits.softmax(0)
        slope = shares * (fall - (shares * fall).sum()) + self.weight_decay * self.logits
        self._num_steps += 1
        first = torch.lerp(self.moments[0], slope, 1 - _BETAS[0])
        second = torch.lerp(self.moments[1], slope.square(), 1 - _BETAS[1])
        self.moments = torch.stack([first, second])
        first = first / (1 - _BETAS[0] ** self._num_steps)
        second = second / (1 - _BETAS[1] ** self._num_steps)
        self.logits = self.logits - self.logits_lr * first / (second.sqrt() + 1e-8)
