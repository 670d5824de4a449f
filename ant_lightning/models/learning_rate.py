"""EDM2's learning rate: constant, then falling with the inverse square root of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim.lr_scheduler import LRScheduler

from ant_lightning.errors import check_at_least

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


class InverseSqrtLR(LRScheduler):
    """`lr / sqrt(max(n / reference_steps, 1)) * min(n / warmup_steps, 1)` after `n` steps.

    `lr` is the optimizer's. EDM2 counts its warm-up in images: `warmup_steps` is that number
    divided by the batch size. As in the official code, the first step of a warm-up has rate 0.

    Args:
        optimizer: Its learning rate is the peak.
        reference_steps: Steps after which the rate falls; 0 for never.
        warmup_steps: Steps in which the rate grows linearly from 0; 0 for none. Need not be whole.

    Raises:
        ConfigError: If a number is negative.

    Reference:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
        arXiv 2312.02696, equation 67.

    Examples:
        >>> import torch
        >>> from ant_lightning import InverseSqrtLR
        >>> optimizer = torch.optim.Adam([torch.zeros(1)], lr=0.01)
        >>> scheduler = InverseSqrtLR(optimizer, reference_steps=100, warmup_steps=10)
        >>> [round(0.01 * scheduler.factor(n), 4) for n in (0, 5, 10, 100, 400)]
        [0.0, 0.005, 0.01, 0.01, 0.005]
    """

    def __init__(
        self, optimizer: Optimizer, *, reference_steps: float = 70_000, warmup_steps: float = 0
    ) -> None:
        check_at_least(0, reference_steps=reference_steps, warmup_steps=warmup_steps)
        self.reference_steps = reference_steps
        self.warmup_steps = warmup_steps
        super().__init__(optimizer)

    def factor(self, num_steps: float) -> float:
        """Factor of the optimizer's learning rate after that many steps."""
        factor = 1.0
        if self.reference_steps:
            factor /= math.sqrt(max(num_steps / self.reference_steps, 1.0))
        if self.warmup_steps:
            factor *= min(num_steps / self.warmup_steps, 1.0)
        return factor

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group in the next step."""
        return [lr * self.factor(self.last_epoch) for lr in self.base_lrs]
