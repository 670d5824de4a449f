"""How the task gradients of a run are computed, and which buffers hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ant_lightning.balancing.auto import Auto
from ant_lightning.balancing.base import GradientBalancer
from ant_lightning.balancing.differentiation import differentiation
from ant_lightning.balancing.engines import Engine, Loop
from ant_lightning.balancing.low_memory import LowMemory
from ant_lightning.balancing.one_pass import OnePass
from ant_lightning.balancing.parameters import trained_parameters
from ant_lightning.balancing.placed import PlacedTaskGradients
from ant_lightning.balancing.reduction import default_reduction
from ant_lightning.balancing.vmap import Vmap

if TYPE_CHECKING:
    from torch import nn

    from ant_lightning.balancing.gradients import DenseTaskGradients
    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["engine_and_rows"]

_ENGINES: dict[str, type[Engine]] = {
    "auto": Auto,
    "loop": Loop,
    "one_pass": OnePass,
    "vmap": Vmap,
    "low_memory": LowMemory,
}


def engine_and_rows(module: MultiTaskDiffusion) -> tuple[Engine, DenseTaskGradients | None]:
    """A new engine, and new buffers for the ranks and the device of this run if it needs any.

    `auto` is the loop for a compiled network, which no other engine can look into. Buffers that are
    not needed in every step are made when they are, so that they are not held beside the
    activations of ordinary steps.

    Raises:
        ConfigError: If a parameter cannot be trained; `multitask_backward` checks it in every step.
    """
    name = module.tasks.engine
    if name == "auto" and any(_is_compiled(m) for m in module.backbone.modules()):
        name = "loop"
    engine = _ENGINES[name]()
    shared = trained_parameters(module.backbone.parameters())
    if not isinstance(module.balancer, GradientBalancer) or name == "low_memory":
        return engine, None
    reduction = default_reduction()
    if module.tasks.placement == "sorted":
        rows: DenseTaskGradients = PlacedTaskGradients(
            module.num_tasks, shared, reduction=reduction
        )
    else:
        rows = differentiation(shared, reduction).new_rows(module.num_tasks)
    rows.keep = module.balancer.update_every == 1
    return engine, rows


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
