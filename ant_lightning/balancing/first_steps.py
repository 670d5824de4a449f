"""Says so if the first steps of a run lack something that no single step can show."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.balancing.base import Balancer

# A loss scale that is still too high, or a rate that starts at 0, may skip the first steps.
STEPS = 20


class FirstSteps:
    """Warns after 20 steps of a balancer whose parameters do not move or whose tasks are not drawn.

    Args:
        balancer: The balancer of the run; nothing is said without one.
    """

    def __init__(self, balancer: Balancer | None) -> None:
        self._balancer, self._steps = balancer, 0
        self._first: list[Tensor] = []
        self._samples: Tensor | float = 0.0

    def step(self, num_samples: Tensor) -> None:
        """Count a step, which had `num_samples [k]` of the tasks on all ranks."""
        if self._balancer is None or self._steps > STEPS:
            return
        learned = [p for p in self._balancer.parameters() if p.requires_grad]
        if self._steps == 0:
            self._first = [p.detach().clone() for p in learned]
        self._samples = num_samples + self._samples
        if self._steps == STEPS:
            name = type(self._balancer).__name__
            if learned and all(map(torch.equal, learned, self._first)):
                _warn(
                    f"balancer: {name} learns its weights, so an optimizer must have its "
                    f"parameters, found the same values after {STEPS} steps; for instance "
                    "optimizer.add_param_group({'params': step.balancer.parameters(), "
                    "'lr': 0.025, 'weight_decay': 0.0})"
                )
            samples = torch.as_tensor(self._samples).tolist()
            drawn = max(task for task, count in enumerate(samples) if count) + 1
            # In few samples, a task of a small share may well be missing.
            if drawn < len(samples) and sum(samples) >= 50 * len(samples):
                _warn(
                    f"tasks: {name} has {len(samples)} tasks, but {STEPS + 1} steps had samples of "
                    f"the first {drawn} only; num_tasks must be that of the clusters"
                )
        self._steps += 1


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
