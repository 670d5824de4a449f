"""The parts of a step whose batch does not arrive at once: gradients and losses of all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from ant_lightning.balancing.parameters import same_tensors
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ant_lightning.balancing.base import Balancer
    from ant_lightning.balancing.step_losses import StepLosses
    from ant_lightning.balancing.task_batch import TaskBatch


class Accumulation:
    """Adds up the parts of a step, so that its gradient is that of the joined batch.

    The gradient of part j is `sum_i w_i g_ij / n_ij`, where `g_ij` sums over the `n_ij` samples of
    task i. If the weights are of samples, or the `n_ij` of all parts are in the same proportion,
    the gradient of the joined batch is the mean over parts, weighted by their size. Otherwise the
    numbers of samples of the whole step must be known from the start, and the gradient is a sum.

    Args:
        balancer: How the tasks are weighted.
        num_samples: Samples of each task of this rank in the whole step, `[k]`, if known.

    Attributes:
        total: The gradient of all parts until now, one tensor for each parameter.
        num_tasks: Number of tasks `k`; without a balancer it grows with the parts.

    Raises:
        ConfigError: If the balancer's weights need the whole batch.
    """

    def __init__(self, balancer: Balancer, num_samples: Tensor | None) -> None:
        if balancer.accumulation == "none":
            raise ConfigError(
                f"accumulate: must be False with {type(balancer).__name__}, whose weights need "
                "the whole batch of a step at once; to save memory use micro_batch_size, found True"
            )
        self.num_tasks = balancer.num_tasks
        self._any = balancer.accumulation == "any"
        self._name = type(balancer).__name__
        self._of_step = None if num_samples is None else num_samples.cpu().double()
        zeros = torch.zeros(self.num_tasks, dtype=torch.float64)
        self._own = zeros  # samples of this rank so far, [k]
        self._counts = zeros  # of all ranks so far, [k]
        self._share = 1.0  # of the part in the samples so far
        self._shared: list[Tensor] = []
        self.total: list[Tensor] = []
        self._step: StepLosses | None = None
        self._weights: Tensor | None = None

    def check(self, num_samples: Tensor | None) -> None:
        """Refuse a part that speaks of another step than the first part did."""
        now = None if num_samples is None else num_samples.cpu().double()
        if (now is None) != (self._of_step is None) or (
            now is not None and not torch.equal(now, self._of_step)  # type: ignore[arg-type]
        ):
            then = None if self._of_step is None else self._of_step.tolist()
            found = None if now is None else now.tolist()
            raise ConfigError(f"num_samples: must be {then} in all parts of a step, found {found}")

    def begin(self, batch: TaskBatch, *, last: bool) -> float:
        """Begin a part, before its forward pass; its gradient is to be added to `total`.

        Args:
            batch: The part.
            last: Whether no part follows.

        Returns:
            A factor of the part's weights.

        Raises:
            ConfigError: If the numbers of samples, or the parameters, do not fit the other parts.
        """
        if self.total and not same_tensors(batch.shared, self._shared):
            raise ConfigError(
                "parameters: the same must be trained in all parts of a step, found a change"
            )
        self._shared = list(batch.shared)
        self._grow(batch.num_tasks - self.num_tasks)
        # On the host: every rank sees the same counts and takes the same branch.
        before, now = self._counts, batch.num_samples.cpu()
        self._own = self._own + torch.tensor(batch.starts).diff()
        self._counts = before + now
        if self._of_step is not None:
            if last and not torch.equal(self._own, self._of_step):
                raise ConfigError(
                    "num_samples: must be the samples of all parts of the step, "
                    f"{self._own.tolist()}, found {self._of_step.tolist()}"
                )
            return 1.0
        # In the same proportion: products of whole numbers are exact in float64.
        equal = torch.equal(now * before.sum(), before * now.sum())
        if self.total and not self._any and not equal:
            raise ConfigError(
                f"num_samples: must be passed with {self._name} if the parts of a step have their "
                "tasks in different proportions: the numbers of samples of the whole step, found "
                f"parts with {before.tolist()} and {now.tolist()}"
            )
        self._share = float(now.sum() / self._counts.sum())
        if self.total:
            torch._foreach_mul_(self.total, 1 - self._share)
        return self._share

    def _grow(self, more: int) -> None:
        """Make room for tasks that no earlier part had."""
        if not more:
            return
        self.num_tasks += more
        self._own, self._counts = pad(self._own, (0, more)), pad(self._counts, (0, more))
        if self._weights is not None and self._step is not None:
            self._weights = pad(self._weights, (0, more))
            losses = self._step.task_losses
            self._step = replace(
                self._step,
                num_samples=pad(self._step.num_samples, (0, more)),
                # The loss of a task without samples is not read.
                task_losses=None if losses is None else pad(losses, (0, more)),
            )

    def end(
        self, batch: TaskBatch, total: Sequence[Tensor], weights: Tensor, step: StepLosses
    ) -> tuple[Tensor, StepLosses]:
        """End a part.

        Args:
            batch: The part.
            total: The gradient of all parts until now.
            weights: Weights of the mean task losses of this part, `[k]`.
            step: What the balancer sees of this part.

        Returns:
            The weights and the losses of all parts until now.
        """
        self.total = list(total)
        if self._weights is not None:
            weights = torch.lerp(self._weights, weights, self._share)
        self._step, self._weights = self._joined(batch, step), weights
        return weights, self._step

    def _joined(self, batch: TaskBatch, step: StepLosses) -> StepLosses:
        """The samples and losses of all parts until now."""
        before, now = self._step, replace(step, num_samples=batch.num_samples)
        if before is None:
            return now
        both = before, now
        counts = before.num_samples + now.num_samples
        means = [each.task_losses for each in both if each.task_losses is not None]
        # 0 / 0 of a part without samples counts as 0; any other NaN or infinity stays.
        sums = [
            torch.where(each.num_samples > 0, mean * each.num_samples, 0)
            for each, mean in zip(both, means, strict=True)
        ]
        levels = [each.log_snr for each in both if each.log_snr is not None]
        return replace(
            now,
            tasks=torch.cat([each.tasks for each in both]),
            losses=torch.cat([each.losses for each in both if each.losses is not None]),
            log_snr=torch.cat([each.to(now.tasks.device) for each in levels]) if levels else None,
            num_samples=counts,
            task_losses=(sums[0] + sums[1]) / counts,
        )
