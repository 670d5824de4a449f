"""Fixed weights: linear scalarization of the task losses, and the plain mean over samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ant_lightning.balancing.base import Balancer, LossBalancer
from ant_lightning.balancing.step_losses import Weights
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float

    from ant_lightning.balancing.step_losses import StepLosses


class SampleMean(Balancer):
    """The mean over all samples, whatever their tasks and priors: vanilla training."""

    accumulation = "any"

    @property
    def task_weights(self) -> Float[Tensor, " k"]:
        """1/k each, as if all tasks had the same number of samples."""
        return torch.full((self.num_tasks,), 1 / self.num_tasks, dtype=torch.float64)

    def step_weights(self, step: StepLosses) -> Weights:
        """Each task by its share of the samples."""
        share = step.num_samples / step.num_samples.sum()
        per_sample = share / step.num_samples.clamp(min=1)
        return Weights(share, per_sample.to(step.tasks.device)[step.tasks])


class LinearScalarization(LossBalancer):
    """Fixed weights: `objective = sum_i w_i L_i`. The control of every comparison.

    Args:
        num_tasks: Number of tasks `k`.
        weights: `k` positive numbers, used as given; 1/k each by default, the mean over tasks.

    Raises:
        ConfigError: If `weights` are not `k` positive finite numbers.

    Examples:
        >>> balancer = LinearScalarization(num_tasks=2, weights=[0.5, 0.25])
        >>> balancer(torch.tensor([2.0, 4.0]))
        tensor(2.)
    """

    weights: Tensor

    def __init__(self, num_tasks: int, *, weights: Sequence[float] | None = None) -> None:
        super().__init__(num_tasks)
        values = [1 / num_tasks] * num_tasks if weights is None else [float(w) for w in weights]
        if len(values) != num_tasks or not all(0 < w < float("inf") for w in values):
            raise ConfigError(f"weights: must be {num_tasks} positive numbers, found {values}")
        self.register_buffer("weights", torch.tensor(values, dtype=torch.float64))

    def forward(self, task_losses: Float[Tensor, " k"]) -> Float[Tensor, ""]:
        """The weighted sum of the task losses `[k]`."""
        self._check_tasks(task_losses, "task_losses", 1)
        dtype = torch.promote_types(task_losses.dtype, torch.float32)
        return (self.weights.to(task_losses.device, dtype) * task_losses.to(dtype)).sum()

    def loss_weights(self) -> Float[Tensor, " k"]:
        """The fixed weights `[k]`, float64."""
        return self.weights
