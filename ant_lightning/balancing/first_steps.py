"""Says so if the first steps of a run show a mistake in the loop around them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ant_lightning.balancing.backward import BackwardReport
    from ant_lightning.balancing.base import Balancer

# A loss scale that is still too high, or a rate that starts at 0, may skip the first steps.
STEPS = 20


class FirstSteps:
    """Watches 20 steps, and warns of what would train nothing, or not what was meant.

    Args:
        balancer: The balancer of the run.
    """

    def __init__(self, balancer: Balancer | None) -> None:
        self._balancer, self._steps = balancer, 0
        self._first: list[Tensor] = []  # what the balancer learns, as it was
        self._drive: Tensor | float = 0.0  # of its gradients, over all steps
        self._samples: Tensor | float = 0.0
        self._versions = -1
        self._smallest: Tensor | None = None
        self._moves = self._said = False

    @property
    def over(self) -> bool:
        """Whether nothing is watched any more."""
        return self._steps > STEPS

    def check_moved(self, parameters: Sequence[nn.Parameter], *, advice: str) -> None:
        """Warn if the parameters are those of the last step, but have moved between others.

        A measurement that never moves them is not meant.
        """
        if self.over or self._smallest is None:
            return
        # The first is free, the second is for optimizers that write to `p.data`.
        if _versions(parameters) != self._versions or not torch.equal(
            self._smallest, min(parameters, key=torch.numel)
        ):
            self._moves = True
        elif self._moves and not self._said:
            self._said = True
            _warn(f"parameters: must change between two steps, found no change; {advice}", frames=4)

    def step(self, report: BackwardReport, values: Tensor, shared: Sequence[nn.Parameter]) -> None:
        """Look at a finite step.

        Args:
            report: Its report.
            values: Loss of each sample of the last part, `[b]`.
            shared: The trained parameters, with their gradients.
        """
        if self.over:
            return
        learned = [] if self._balancer is None else self._balancer.parameters()
        learned = [p for p in learned if p.requires_grad]
        if self._steps == 0:
            self._first = [p.detach().clone() for p in learned]
            self._check_first(report, values)
        for p in learned:
            self._drive = self._drive + (0.0 if p.grad is None else p.grad.abs().sum())
        self._samples = report.num_samples + self._samples
        if self._steps == STEPS and self._balancer is not None:
            self._check_last(self._balancer, learned)
        self._steps += 1
        if all(type(p.data) is torch.Tensor for p in shared):  # not shards
            self._versions = _versions(shared)
            self._smallest = min(shared, key=torch.numel).detach().clone()

    @staticmethod
    def _check_first(report: BackwardReport, values: Tensor) -> None:
        # Gradients that cancel out are no mistake: the losses' own have lengths.
        if not (report.grad_norm if report.gramian is None else report.gramian.trace()):
            _warn(
                "losses: must depend on the parameters of the step, found gradients of zero; do "
                "the losses call another copy of the model?"
            )
        tasks = int((report.num_samples > 0).sum())
        if len(values) >= max(16, 2 * tasks) and len(values.unique()) <= tasks:
            _warn(
                f"losses: must be one for each sample, found the same for all {len(values)} or "
                "for all of a task; was a mean expanded?"
            )

    def _check_last(self, balancer: Balancer, learned: Sequence[Tensor]) -> None:
        name = type(balancer).__name__
        if self._drive and all(map(torch.equal, learned, self._first)):
            _warn(
                f"balancer: {name} learns its weights, so an optimizer must have its parameters, "
                f"found the same values after {STEPS} steps; for instance "
                "optimizer.add_param_group({'params': step.balancer.parameters(), "
                f"'lr': {getattr(balancer, 'lr', 0.025)}, 'weight_decay': 0.0}})"
            )
        samples = torch.as_tensor(self._samples).tolist()
        drawn = max(task for task, count in enumerate(samples) if count) + 1
        # In few samples, a task of a small share may well be missing.
        if drawn < len(samples) and sum(samples) >= 50 * len(samples):
            _warn(
                f"tasks: {name} has {len(samples)} tasks, but {STEPS + 1} steps had samples of "
                f"the first {drawn} only; num_tasks must be that of the clusters"
            )


def _versions(parameters: Sequence[nn.Parameter]) -> int:
    """A number that grows with every write to a parameter."""
    return sum(p._version for p in parameters)


def _warn(message: str, *, frames: int = 5) -> None:
    warnings.warn(message, stacklevel=frames)  # at the call of `MultiTaskStep`
