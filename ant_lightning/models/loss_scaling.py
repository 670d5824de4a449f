"""The scale of losses in float16, and the norm of gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.local_parts import local_part

if TYPE_CHECKING:
    from collections.abc import Iterable

    import lightning as L
    from torch import Tensor
    from torch.optim import Optimizer


def clip_gradients_(parameters: Iterable[Tensor], norm: Tensor, max_norm: float | None) -> None:
    """Clip `.grad` by a norm that is known: `clip_grad_norm_` of torch computes it once more.

    Args:
        parameters: Those whose gradients are multiplied by `min(1, max_norm / norm)`.
        norm: Norm of the gradients; the host does not wait for it.
        max_norm: Largest norm; `None` for no limit.
    """
    if max_norm is None:
        return
    grads = [local_part(p.grad) for p in parameters if p.grad is not None]
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    # At least float32: the first parameter may be bfloat16 and others not.
    torch._foreach_mul_(grads, factor.to(torch.promote_types(grads[0].dtype, torch.float32)))


def gradient_scaler(trainer: L.Trainer) -> torch.amp.GradScaler | None:
    """The scaler of `precision="16-mixed"`; `None` for every other precision."""
    return getattr(trainer.precision_plugin, "scaler", None)


def loss_scale(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | float:
    """The factor of the losses before differentiation; the host does not wait for the device."""
    if scaler is None:
        return 1.0
    return scaler.scale(torch.ones((), device=device, dtype=torch.float32))


def back_off(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
    """Shrink the scale as after an overflow, without an optimizer step.

    A skipped step has removed its gradients, so the scaler is given one infinite gradient instead.
    """
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.full_like(parameter, torch.inf)
    scaler.unscale_(optimizer)
    scaler.update()
    parameter.grad = None
