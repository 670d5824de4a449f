"""Optimizer and scheduler settings that changed between a checkpoint and the run resuming it."""

from __future__ import annotations

import json
import re
import warnings
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ant_lightning.balancing.base import Balancer
from ant_lightning.balancing.linear import LinearScalarization
from ant_lightning.errors import ConfigError
from ant_lightning.files.identity import differences
from ant_lightning.models.optimizers import step_scheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from ant_lightning.models.autoencoder import AutoencoderModule
    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["optimization_settings", "resume_with_settings", "say_changed"]

# In a scheduler's state but not settings: its counts, and what it derives from the optimizer.
_NOT_SETTINGS = {
    "_get_lr_called_within_step",
    "_is_initial",
    "_last_lr",
    "_step_count",
    "base_lrs",
    "last_epoch",
    "lr_lambdas",
}


def optimization_settings(
    make: Callable[[list[dict[str, Any]]], tuple[Optimizer, Any]],
    num_groups: int,
    *,
    warmup_steps: int = 0,
) -> dict[str, Any]:
    """The settings of optimizer and scheduler by name, as plain values.

    Args:
        make: Makes both from parameter groups; the scheduler may be None.
        num_groups: Number of parameter groups: the network's, and the balancer's if it has
            parameters.
        warmup_steps: The module's `warmup_steps`.
    """
    optimizer, scheduler = _trial(make, num_groups)
    found = _of_groups(optimizer.state_dict()["param_groups"])
    found["model.lr_scheduler"] = None if warmup_steps else _kind(scheduler)
    found["model.warmup_steps"] = warmup_steps
    if scheduler is not None:
        found |= _of_scheduler(scheduler.state_dict())
    plain: dict[str, Any] = json.loads(json.dumps(found, default=lambda each: type(each).__name__))
    return plain


def resume_with_settings(
    module: MultiTaskDiffusion | AutoencoderModule,
    checkpoint: dict[str, Any],
    current: dict[str, Any],
) -> None:
    """Make the settings of this run override those in a checkpoint, and report what changed.

    The optimizer keeps its moments. The learning rates are those that a run with the current
    settings would have after the same number of steps. If nothing changed, the checkpoint is left
    untouched, so that a resumed run equals an uninterrupted one.

    Args:
        module: The module whose run resumes.
        checkpoint: As Lightning loaded it; its optimizer and scheduler states are replaced.
        current: The `optimization_settings` of this run.
    """
    states = checkpoint.get("callbacks") or {}
    for key in list(states):  # version 0.1 put the saving intervals into the key
        old = re.match(r"(Checkpoints\{'monitor': .*?, 'mode': '\w+'), ", key)
        if old:
            states[old.group(1) + "}"] = states.pop(key)
    stored = (checkpoint.get("ant_lightning") or {}).get("optimization")
    changed = _keep_fixed_weights(getattr(module, "balancer", None), checkpoint)
    changed |= _apply(checkpoint, stored, current, module.make_optimization)
    if changed:
        # A sharded strategy has loaded the optimizer already; others load it from `checkpoint`.
        for optimizer, state in zip(
            module.trainer.optimizers, checkpoint["optimizer_states"], strict=False
        ):
            for group, now in zip(optimizer.param_groups, state["param_groups"], strict=False):
                group.update({name: now[name] for name in now if name != "params"})
    if module.trainer.is_global_zero:
        say_changed(changed)


def say_changed(changed: dict[str, tuple[Any, Any]], *, effect: str = "from now on") -> None:
    """Print one line for each setting that differs from the checkpoint's."""
    for name, pair in changed.items():
        then, now = ("null" if each is None else each for each in pair)
        print(f"{name}: {now} {effect}, the checkpoint has {then}", flush=True)


def _apply(
    checkpoint: dict[str, Any],
    stored: dict[str, Any] | None,
    current: dict[str, Any],
    make: Callable[[list[dict[str, Any]]], tuple[Optimizer, Any]],
) -> dict[str, tuple[Any, Any]]:
    """Update the states of optimizer and scheduler in `checkpoint` if their settings changed."""
    states = checkpoint.get("optimizer_states") or []
    if len(states) != 1:  # files of weights alone have none
        return {}
    groups = states[0]["param_groups"]
    schedulers = checkpoint.get("lr_schedulers") or []
    if stored is None:
        stored = _of_groups(groups) | (_of_scheduler(schedulers[0]) if schedulers else {})
        # Settings that 0.1 did not store are assumed unchanged; whether there was a scheduler shows
        # in the checkpoint.
        scheduled = current["model.lr_scheduler"] or current["model.warmup_steps"]
        if bool(scheduled) != bool(schedulers):
            stored |= {"model.lr_scheduler": "one" if schedulers else None}
        current = {name: current[name] for name in current if name in stored}
        stored = {name: stored[name] for name in current}
    changed = differences(stored, current)
    if not changed:
        return {}
    optimizer, scheduler = _trial(make, len(groups))
    _check_state(states[0]["state"], optimizer, changed)
    if scheduler is not None:
        _step(scheduler, int(checkpoint["global_step"]))
    fresh = optimizer.state_dict()["param_groups"]
    for group, now in zip(groups, fresh, strict=True):
        params = group["params"]
        group.clear()
        group.update(now, params=params)
    checkpoint["lr_schedulers"] = [] if scheduler is None else [scheduler.state_dict()]
    return changed


def _keep_fixed_weights(
    balancer: Balancer | None, checkpoint: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Make the weights in the settings override the stored ones; returns what changed."""
    name = "balancer.weights"
    stored = (checkpoint.get("state_dict") or {}).get(name)
    if not isinstance(balancer, LinearScalarization) or stored is None:
        return {}
    checkpoint["state_dict"][name] = balancer.weights.clone()
    pair = stored.tolist(), balancer.weights.tolist()
    return {"model.balancer.weights": pair} if pair[0] != pair[1] else {}


def _step(scheduler: Any, num_steps: int) -> None:  # noqa: ANN401 - of torch
    """Advance a new scheduler by `num_steps`."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")
            for _ in range(num_steps):
                step_scheduler(scheduler)
    except Exception as error:  # for instance a schedule that is over
        raise ConfigError(
            f"model.lr_scheduler: must last longer than the {num_steps} steps of the checkpoint, "
            f"found: {error}"
        ) from error


def _check_state(
    stored: dict[int, dict[str, Any]],
    optimizer: Optimizer,
    changed: dict[str, tuple[Any, Any]],
) -> None:
    """Refuse settings whose optimizer state is not in the checkpoint, such as `amsgrad`."""
    trial = deepcopy(optimizer)
    parts = next(iter(stored.values()), {})
    small = {
        name: torch.zeros(1, dtype=part.dtype) if isinstance(part, Tensor) and part.dim() else part
        for name, part in parts.items()
    }
    parameters = [each for group in trial.param_groups for each in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
        trial.state[parameter] = deepcopy(small)
    try:
        trial.step()
    except Exception as error:  # what an optimizer raises without its state is up to it
        name, (then, now) = next(
            (item for item in changed.items() if item[0].startswith("model.optimizer.")),
            ("model.optimizer", ("another", "this one")),
        )
        raise ConfigError(
            f"{name}: must stay {then} in a resumed run, because the checkpoint holds no state for "
            f"another value, found {now}"
        ) from error


def _trial(
    make: Callable[[list[dict[str, Any]]], tuple[Optimizer, Any]], num_groups: int
) -> tuple[Optimizer, Any]:
    """Optimizer and scheduler of throwaway parameters, one per group."""
    return make([{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(num_groups)])


def _of_groups(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The optimizer settings of the network's group, and the learning rate of the balancer's."""
    found = {
        f"model.optimizer.{name}": value
        for name, value in groups[0].items()
        if name not in {"params", "initial_lr", "param_names"}
    }
    found["model.optimizer.lr"] = groups[0].get("initial_lr", groups[0]["lr"])
    if len(groups) > 1:
        found["model.balancer.lr"] = groups[1].get("initial_lr", groups[1]["lr"])
    return found


def _of_scheduler(state: dict[str, Any]) -> dict[str, Any]:
    return {
        f"model.lr_scheduler.{name}": value
        for name, value in state.items()
        if name not in _NOT_SETTINGS and isinstance(value, bool | int | float | str | list | tuple)
    }


def _kind(value: object) -> str | None:
    return None if value is None else type(value).__name__
