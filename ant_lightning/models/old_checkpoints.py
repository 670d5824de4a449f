"""Checkpoints of earlier versions in the form of today's."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["upgrade"]

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
    """Bring a checkpoint that Lightning loaded into today's form; a no-op for one of today.

    Its network, clusters and optimizer stay as they are.
    """
    # The keys of `Checkpoints` held the saving intervals.
    states = checkpoint.get("callbacks") or {}
    for key in list(states):
        old = re.match(r"(Checkpoints\{'monitor': .*?, 'mode': '\w+'), ", str(key))
        if old:
            states[old.group(1) + "}"] = states.pop(key)
    # Schedulers also changed the learning rate of the balancer, the second parameter group.
    for state in checkpoint.get("lr_schedulers") or []:
        for each in (state, *state.get("_schedulers", [])):
            for name in _BY_GROUP:
                if isinstance(each.get(name), list):
                    each[name] = each[name][:1]
    for state in checkpoint.get("optimizer_states") or []:
        for group in state.get("param_groups", [])[1:]:
            if "initial_lr" in group:
                group["lr"] = group.pop("initial_lr")
    # `optimizer.lr` was `model.optimizer.lr`.
    own = checkpoint.get("ant_lightning") or {}
    if own.get("optimization"):
        own["optimization"] = {
            name.removeprefix("model."): value for name, value in own["optimization"].items()
        }
