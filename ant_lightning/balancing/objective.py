"""Base class of the balancers whose weights depend on the losses of their own step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ant_lightning.balancing.base import LossBalancer

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float

    from ant_lightning.balancing.step_losses import StepLosses, Weights


class ObjectiveBalancer(LossBalancer):
    """Base of the balancers given by an objective `f(L)`: the weights are `df / dL` in each step.

    A subclass writes `forward` alone. A task without samples has a loss of NaN there, and must get
    no weight.

    Examples:
        >>> from ant_lightning.balancing import ObjectiveBalancer
        >>> class HalfSquares(ObjectiveBalancer):
        ...     def forward(self, task_losses):
        ...         return task_losses.nan_to_num().square().sum() / 2
        >>> HalfSquares(num_tasks=2).derivative(torch.tensor([1.0, 3.0]))
        tensor([1., 3.])
    """

    needs_losses = True
    accumulation = "none"
    kept_weights: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        uniform = torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64)
        self.register_buffer("kept_weights", uniform)

    def loss_weights(self) -> Float[Tensor, " k"]:
        """The weights of the last step, `[k]` float64; 1/k before the first."""
        return self.kept_weights

    def derivative(self, task_losses: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Derivative of the objective with respect to the losses, `[k]`."""
        with torch.enable_grad():
            losses = task_losses.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self(losses), losses)
        return slope

    def step_weights(self, step: StepLosses) -> Weights:
        """The derivative at the losses of this step."""
        return step.by_task(self.derivative(step.shown_losses))

    def own_gradients(self, step: StepLosses) -> tuple[Tensor | None, list[Tensor]]:
        """The objective; there are no trained parameters."""
        with torch.no_grad():
            return self(step.shown_losses), []

    def update(self, step: StepLosses, losses_now: Callable[[], Tensor] | None = None) -> None:
        """Keep the weights of the step."""
        assert step.task_weights is not None, "this step has no weights yet"
        self.kept_weights = step.task_weights / step.scaled_priors
