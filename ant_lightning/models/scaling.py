"""The gradient scaler of mixed precision in float16, under manual optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

__all__ = ["back_off", "gradient_scaler", "loss_scale"]


def gradient_scaler(trainer: L.Trainer) -> torch.amp.GradScaler | None:
    """The scaler of `precision="16-mixed"`; None for every other precision."""
    return getattr(trainer.precision_plugin, "scaler", None)


def loss_scale(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | float:
    """What losses are multiplied with before they are differentiated; waits for no device."""
    if scaler is None:
        return 1.0
    return scaler.scale(torch.ones((), device=device, dtype=torch.float32))


def back_off(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Shrink the scale as after an overflow; the optimizer makes no step.

    The gradients that overflowed are gone, so the scaler is shown one infinity in their place.
    """
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.full_like(parameter, torch.inf)
    scaler.unscale_(optimizer)
    scaler.update()
    parameter.grad = None
