"""Says so if the weights that a balancer should learn are in no optimizer."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.balancing.base import Balancer

# A loss scale that is still too high, or a rate that starts at 0, may skip the first steps.
STEPS = 20


class UntrainedWeights:
    """Compares the parameters of a balancer with those of the first step, once."""

    def __init__(self, balancer: Balancer | None) -> None:
        self._balancer, self._steps = balancer, 0
        self._first: list[Tensor] = []

    def step(self) -> None:
        """Count a step; warn at step 20 if no parameter has moved."""
        if self._balancer is None or self._steps > STEPS:
            return
        learned = [p for p in self._balancer.parameters() if p.requires_grad]
        if self._steps == 0:
            self._first = [p.detach().clone() for p in learned]
        if self._steps == STEPS and learned and all(map(torch.equal, learned, self._first)):
            name = type(self._balancer).__name__
            warnings.warn(
                f"balancer: {name} learns its weights, so an optimizer must have its parameters, "
                f"found the same values after {STEPS} steps; for instance "
                "optimizer.add_param_group({'params': step.balancer.parameters(), 'lr': 0.025, "
                "'weight_decay': 0.0})",
                stacklevel=3,
            )
        self._steps += 1
