"""Which buffers hold the task gradients of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ant_lightning.balancing import (
    GradientBalancer,
    PlacedTaskGradients,
    default_reduction,
)
from ant_lightning.balancing.differentiation import differentiation

if TYPE_CHECKING:
    from ant_lightning.balancing import DenseTaskGradients
    from ant_lightning.modules.multitask import MultiTaskDiffusion

__all__ = ["row_buffers"]


def row_buffers(module: MultiTaskDiffusion) -> DenseTaskGradients | None:
    """New buffers for the ranks and the device of this run; None if the method makes no rows."""
    if not isinstance(module.balancer, GradientBalancer):
        return None
    shared = [p for p in module.backbone.parameters() if p.requires_grad]
    if module.placement == "sorted":
        return PlacedTaskGradients(module.num_tasks, shared, reduction=default_reduction())
    return differentiation(shared, default_reduction()).new_rows(module.num_tasks)
