"""The optimizer and its learning rates, made of settings that may be out of range."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim import LBFGS, SparseAdam

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning as L
    from torch.optim import Optimizer

__all__ = [
    "forget_balancers_schedule",
    "make_optimizer",
    "make_scheduler",
    "planned_steps",
    "step_scheduler",
]

Made = TypeVar("Made")

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


def make_optimizer(factory: Callable[[Any], Optimizer] | None, groups: Any) -> Optimizer:  # noqa: ANN401
    """The optimizer of parameters or groups of them.

    Raises:
        ConfigError: If it refuses its settings, or cannot step on gradients that are there.
    """
    optimizer = _made("model.optimizer", factory, groups)
    if isinstance(optimizer, LBFGS | SparseAdam):
        raise ConfigError(
            "model.optimizer: must make its step from one gradient of ordinary tensors, as AdamW "
            f"and SGD do, found {type(optimizer).__name__}"
        )
    return optimizer


def make_scheduler(
    factory: Callable[[Any], Any],
    optimizer: Optimizer,
    remake: Callable[[Any], Optimizer],
    *,
    num_steps: float | None = None,
) -> Any:  # noqa: ANN401 - Lightning's own loose type
    """The scheduler of the backbone's learning rate, tried out on a throwaway optimizer first.

    Step it with `step_scheduler`: it only knows the optimizer's first group.

    Args:
        factory: Makes it.
        optimizer: Whose learning rate it sets.
        remake: Makes another optimizer of that kind.
        num_steps: Optimizer steps of the run; infinity if only time ends it, None if not known.

    Raises:
        ConfigError: If the scheduler refuses its settings, at once or in a step, or ends before
            the run does.
    """
    trial = _made("model.lr_scheduler", factory, remake([{"params": [torch.zeros(1)]}]))
    total = getattr(trial, "total_steps", None)
    if total is not None and num_steps is not None and total < num_steps:
        steps = (
            "without trainer.max_steps" if num_steps == float("inf") else f"of {num_steps} steps"
        )
        raise ConfigError(
            "model.lr_scheduler.total_steps: must be at least the steps of the run, as there is no "
            f"learning rate after them, found {total} in a run {steps}"
        )
    for _ in range(2 if total is None else min(2, total)):
        trial.optimizer.step()
        _made("model.lr_scheduler", lambda scheduler: scheduler.step(), trial)
    with _backbone_only(optimizer):
        return _made("model.lr_scheduler", factory, optimizer)


def step_scheduler(scheduler: Any) -> None:  # noqa: ANN401 - Lightning's own loose type
    """Set the backbone's learning rate for the next step.

    The balancer's parameters keep `model.balancer.lr` under any scheduler, whose peak, floor or
    decay are meant for the network.

    Raises:
        ConfigError: If the scheduler has no rate for that step.
    """
    with _backbone_only(scheduler.optimizer):
        _made("model.lr_scheduler", lambda each: each.step(), scheduler)


def forget_balancers_schedule(checkpoint: dict[str, Any]) -> None:
    """Undo, in a checkpoint of version 0.1, the scheduler's changes to the balancer's rate."""
    for state in checkpoint.get("lr_schedulers") or []:
        for each in (state, *state.get("_schedulers", [])):
            for name in _BY_GROUP:
                if isinstance(each.get(name), list):
                    each[name] = each[name][:1]
    for state in checkpoint.get("optimizer_states") or []:
        for group in state.get("param_groups", [])[1:]:
            if "initial_lr" in group:
                group["lr"] = group.pop("initial_lr")


def planned_steps(trainer: L.Trainer) -> float | None:
    """Optimizer steps after which a run ends; infinity without a limit, None if unknown.

    `Trainer.estimated_stepping_batches` would set up the loader before a checkpoint restores its
    position.
    """
    by_steps = float("inf") if trainer.max_steps in (-1, None) else trainer.max_steps
    epochs, limit = trainer.max_epochs, trainer.limit_train_batches
    if epochs in (-1, None):
        return by_steps
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "train_images"):  # loaders, or the user's own data module
        return None
    batches = len(data.train_images) // data.batch_size
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return min(by_steps, epochs * batches)


@contextmanager
def _backbone_only(optimizer: Optimizer) -> Iterator[None]:
    """Context that hides all but the optimizer's first group: schedulers change all they see."""
    groups = optimizer.param_groups
    optimizer.param_groups = groups[:1]
    try:
        yield
    finally:
        optimizer.param_groups = groups


def _made(setting: str, factory: Callable[[Any], Made] | None, argument: Any) -> Made:  # noqa: ANN401
    if factory is None:
        raise ConfigError(f"{setting}: must be a class of torch with its settings, found null")
    try:
        return factory(argument)
    except Exception as error:  # whatever a third party's class makes of its settings
        raise ConfigError(
            f"{setting}: refused its settings: {error or type(error).__name__}"
        ) from error
