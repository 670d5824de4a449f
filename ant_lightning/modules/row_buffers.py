"""Which buffers hold the task gradients of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ant_lightning.balancing import (
    DenseTaskGradients,
    GradientBalancer,
    PlacedTaskGradients,
    default_reduction,
)

if TYPE_CHECKING:
    from ant_lightning.modules.multitask import MultiTaskDiffusion

__all__ = ["row_buffers"]


def row_buffers(module: MultiTaskDiffusion) -> DenseTaskGradients | None:
    """New buffers for the ranks and the device of this run; None if the method makes no rows."""
    if not isinstance(module.balancer, GradientBalancer):
        return None
    shared = [p for p in module.backbone.parameters() if p.requires_grad]
    kind = PlacedTaskGradients if module.placement == "sorted" else DenseTaskGradients
    return kind(module.num_tasks, shared, reduction=default_reduction())
