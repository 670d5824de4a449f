"""DWA and RLW: weights from the history of the losses, and random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ant_lightning.balancing.base import CountsSteps, LossBalancer
from ant_lightning.errors import check_above, check_whole
from ant_lightning.randomness import keyed_generator

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float

    from ant_lightning.balancing.step_losses import StepLosses


class _Weighted(CountsSteps, LossBalancer):
    """`sum_i w_i L_i` with weights that change in `update` alone."""

    def forward(self, task_losses: Float[Tensor, " k"]) -> Float[Tensor, ""]:
        """The weighted sum of the task losses `[k]`."""
        self._check_tasks(task_losses, "task_losses", 1)
        dtype = torch.promote_types(task_losses.dtype, torch.float32)
        return (self.loss_weights().to(task_losses.device, dtype) * task_losses.to(dtype)).sum()


class DWA(_Weighted):
    """Dynamic weight average: `w = softmax(r / T)`, where `r_i` says how slowly loss i falls.

    `r_i` is the mean of loss i over the last `window` steps, divided by that over the window
    before. The weights are 1/k each until two windows have passed.

    Args:
        num_tasks: Number of tasks `k`.
        window: Steps of a window; the paper's is an epoch.
        temperature: `T`; the larger, the more equal are the weights.

    Raises:
        ConfigError: If `window` is below 1 or `temperature` not above 0.

    Reference:
        Liu et al., "End-to-End Multi-Task Learning with Attention", equation 7, arXiv 1803.10704;
        its weights sum to k, ours to 1.

    Examples:
        >>> DWA(num_tasks=2).loss_weights()
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    sums: Tensor
    means: Tensor

    def __init__(self, num_tasks: int, *, window: int = 1000, temperature: float = 2.0) -> None:
        super().__init__(num_tasks)
        check_whole(1, window=window)
        check_above(0, temperature=temperature)
        self.window = window
        self.temperature = temperature
        # Sums of the losses of this window, and the numbers of steps that had the task.
        self.register_buffer("sums", torch.zeros(2, num_tasks, dtype=torch.float64))
        # Means over the window before the last, and over the last; NaN while unknown.
        unknown = torch.full((2, num_tasks), torch.nan, dtype=torch.float64)
        self.register_buffer("means", unknown)

    def loss_weights(self) -> Float[Tensor, " k"]:
        """The weights `[k]`, float64."""
        rates = self.means[1] / self.means[0]
        # While a mean is unknown, as after a loss of 0, the rate counts as 1.
        return (torch.where(rates.isfinite(), rates, 1) / self.temperature).softmax(0)

    def update(self, step: StepLosses, losses_now: Callable[[], Tensor] | None = None) -> None:
        """Add the losses of the step to those of its window."""
        losses = step.shown_losses
        self.sums = self.sums + torch.stack([losses.nan_to_num(), (~losses.isnan()).double()])
        self._num_steps += 1
        if self._num_steps % self.window == 0:
            self.means = torch.stack([self.means[1], self.sums[0] / self.sums[1]])
            self.sums = torch.zeros_like(self.sums)


class RLW(_Weighted):
    """Random loss weighting: `w = softmax(z)` with standard normal `z`, drawn anew in each step.

    The draws are a function of the seed and the number of steps, equal on all ranks.

    Args:
        num_tasks: Number of tasks `k`.
        seed: Seed of the draws.

    Reference:
        Lin et al., "Reasonable Effectiveness of Random Weighting", algorithm 2, arXiv 2111.10603.

    Examples:
        >>> RLW(num_tasks=3).loss_weights().sum().round(decimals=6)
        tensor(1., dtype=torch.float64)
    """

    def __init__(self, num_tasks: int, *, seed: int = 0) -> None:
        super().__init__(num_tasks)
        self.seed = seed

    def loss_weights(self) -> Float[Tensor, " k"]:
        """The weights of this step, `[k]` float64, on the CPU."""
        generator = keyed_generator(self.seed, "random loss weighting", self._num_steps)
        return torch.randn(self.num_tasks, generator=generator, dtype=torch.float64).softmax(0)

    def update(self, step: StepLosses, losses_now: Callable[[], Tensor] | None = None) -> None:
        """Count the step: the next has other weights."""
        self._num_steps += 1
