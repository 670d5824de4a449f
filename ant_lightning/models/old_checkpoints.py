"""Converts checkpoints of earlier versions to today's form."""

from __future__ import annotations

import re
from typing import Any

# Attributes in which schedulers keep one value per parameter group.
_BY_GROUP = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "max_lrs",
    "min_lrs",
    "base_momentums",
    "max_momentums",
)


def upgrade(checkpoint: dict[str, Any]) -> None:
    """Convert a checkpoint that Lightning loaded to today's form; a no-op if it has that form.

    The weights, the clusters and the optimizer's moments stay as they are.
    """
    # The state keys of `Checkpoints` included the saving intervals, so that a change of them lost
    # the state; see `Checkpoints.state_key`.
    states = checkpoint.get("callbacks") or {}
    for key in list(states):
        old = re.match(r"(Checkpoints\{'monitor': .*?, 'mode': '\w+'), ", str(key))
        if old:
            states[old.group(1) + "}"] = states.pop(key)
    # Schedulers saw the balancer's parameter group too and changed its learning rate: keep only
    # the values of the groups that they see today, and reset the balancer's rate to its setting,
    # `initial_lr`.
    optimizers = checkpoint.get("optimizer_states") or []
    groups = [group for state in optimizers for group in state.get("param_groups", [])]
    seen = 1 + sum("role" in group for group in groups[1:])
    for state in checkpoint.get("lr_schedulers") or []:
        # `SequentialLR` and `ChainedScheduler` keep their schedulers' states in `_schedulers`.
        for each in (state, *state.get("_schedulers", [])):
            for name in _BY_GROUP:
                if isinstance(each.get(name), list):
                    each[name] = each[name][:seen]
    for group in groups[1:]:
        if "initial_lr" in group and "role" not in group:
            group["lr"] = group.pop("initial_lr")
    # The setting `optimizer.lr` was called `model.optimizer.lr`.
    own = checkpoint.get("ant_lightning") or {}
    if own.get("optimization"):
        own["optimization"] = {
            name.removeprefix("model."): value for name, value in own["optimization"].items()
        }
