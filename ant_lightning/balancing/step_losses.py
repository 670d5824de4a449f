"""What a balancer sees of a step, and the weights that it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from ant_lightning.balancing.reduction import Reduction


class Weights(NamedTuple):
    """Weights of one backward pass: its objective is `sum_s samples[s] losses[s]` over all ranks.

    Attributes:
        tasks: Derivative of the objective with respect to the mean loss of each task, `[k]`.
        samples: Derivative with respect to the loss of each sample of this rank, `[b]`.
    """

    tasks: Tensor
    samples: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class StepLosses:
    """What a balancer sees of a step: samples, priors and, once they are known, losses.

    Attributes:
        tasks: Task of each sample of this rank, `[b]`.
        num_samples: Samples of each task on all ranks, `[k]` float64.
        scaled_priors: `k pi`, `[k]` float64: 1 for each task by default.
        reduction: How sums over ranks are made.
        log_snr: Log signal-to-noise ratio of each sample, `[b]`; `None` if it was not passed.
        losses: Loss of each sample, `[b]` float64; `None` before the forward pass.
        task_losses: Mean loss of each task over all ranks, `[k]` float64, NaN for a task without
            samples; `None` before the forward pass.
        gramian: Dot products of the task gradients, `[k, k]` float64; `None` if not computed.
        shared_gramian: The same over the balancer's `shared_parameters` only.
        task_weights: The weights that the balancer gave in this step, `[k]`; `None` before.

    Examples:
        >>> from ant_lightning.balancing import Reduction, StepLosses
        >>> step = StepLosses(
        ...     tasks=torch.tensor([0, 1, 1]),
        ...     num_samples=torch.tensor([1.0, 2.0]),
        ...     scaled_priors=torch.ones(2),
        ...     reduction=Reduction(),
        ... )
        >>> step.by_task(torch.tensor([0.5, 0.5])).samples
        tensor([0.5000, 0.2500, 0.2500])
        >>> step.by_sample(torch.tensor([3.0, 2.0, 1.0])).tasks
        tensor([1., 1.])
    """

    tasks: Int[Tensor, " b"]
    num_samples: Float[Tensor, " k"]
    scaled_priors: Float[Tensor, " k"]
    reduction: Reduction
    log_snr: Float[Tensor, " b"] | None = None
    losses: Float[Tensor, " b"] | None = None
    task_losses: Float[Tensor, " k"] | None = None
    gramian: Float[Tensor, "k k"] | None = None
    shared_gramian: Float[Tensor, "k k"] | None = None
    task_weights: Float[Tensor, " k"] | None = None

    @property
    def shown_losses(self) -> Float[Tensor, " k"]:
        """The task losses that a balancer sees, `k pi_i L_i`; NaN for a task without samples."""
        assert self.task_losses is not None, "the losses of this step are not known yet"
        return self.task_losses * self.scaled_priors

    @property
    def shown_gramian(self) -> Float[Tensor, "k k"]:
        """The Gramian that a balancer sees: that of the gradients `k pi_i g_i`."""
        assert self.gramian is not None, "the Gramian of this step is not known"
        return self.gramian * self.scaled_priors.outer(self.scaled_priors)

    @property
    def levels(self) -> Float[Tensor, " b"]:
        """The log-SNR of the samples, on the device of the losses.

        Raises:
            ConfigError: If it was not passed, or not for each sample.
        """
        if self.log_snr is None or self.log_snr.shape != self.tasks.shape:
            found = None if self.log_snr is None else list(self.log_snr.shape)
            raise ConfigError(
                f"log_snr: a balancer of samples needs that of each of the {len(self.tasks)} "
                f"samples, found {found}"
            )
        return self.log_snr.to(self.tasks.device, non_blocking=True)

    def by_task(self, weights: Float[Tensor, " k"]) -> Weights:
        """Weights of the shown task losses as weights of a backward pass."""
        weights = weights.to(self.scaled_priors) * self.scaled_priors
        # `num_samples` counts all ranks, so the sum of the ranks' gradients is that of the mean
        # losses.
        per_sample = weights / self.num_samples.clamp(min=1)
        return Weights(weights, per_sample.to(self.tasks.device)[self.tasks])

    def by_sample(self, weights: Float[Tensor, " b"]) -> Weights:
        """Weights of samples, whose objective is a mean over all samples, as those of a pass."""
        per_sample = weights.to(self.scaled_priors) * self.scaled_priors[self.tasks]
        per_sample = per_sample / self.num_samples.sum()
        # A task's weight sums over its samples.
        tasks = torch.zeros_like(self.scaled_priors).index_add_(0, self.tasks, per_sample)
        return Weights(self.reduction.all_reduce_(tasks), per_sample)
