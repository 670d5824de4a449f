"""How the task gradients of a run are computed, and which buffers hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ant_lightning.balancing.auto import Auto
from ant_lightning.balancing.base import GradientBalancer
from ant_lightning.balancing.engines import Engine, Loop
from ant_lightning.balancing.one_pass import LowMemory, OnePass
from ant_lightning.balancing.parameters import trained_parameters
from ant_lightning.balancing.placed import PlacedTaskGradients
from ant_lightning.balancing.reduction import default_reduction
from ant_lightning.balancing.sharded import differentiation

if TYPE_CHECKING:
    from torch import nn

    from ant_lightning.balancing.gradients import DenseTaskGradients
    from ant_lightning.models.settings import Tasks

__all__ = ["engine_and_buffers"]

_ENGINES: dict[str, type[Engine]] = {
    "auto": Auto,
    "loop": Loop,
    "one_pass": OnePass,
    "low_memory": LowMemory,
}


def engine_and_buffers(
    tasks: Tasks, backbone: nn.Module
) -> tuple[Engine, DenseTaskGradients | None]:
    """A new engine and, for a gradient balancer, buffers that hold the task gradients.

    Raises:
        ConfigError: If a parameter cannot be trained.
    """
    name, balancer = tasks.engine, tasks.balancer
    parameters = trained_parameters(backbone.parameters())
    if not isinstance(balancer, GradientBalancer) or name == "low_memory":
        return _ENGINES[name](), None
    k, reduction = balancer.num_tasks, default_reduction()
    if tasks.placement == "sorted" and reduction.world_size > 1:
        buffers: DenseTaskGradients = PlacedTaskGradients(k, parameters, reduction=reduction)
    else:
        buffers = differentiation(parameters, reduction).new_rows(k)
    # With `update_every` above 1 most steps need no task gradients: free the buffers after use, so
    # that they take no memory beside the activations of those steps.
    buffers.keep = balancer.update_every == 1
    return _ENGINES[name](), buffers
