"""The optimizer and its learning rates, made of settings that may be out of range."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim import LBFGS, SparseAdam

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

__all__ = ["make_optimizer", "make_scheduler"]

Made = TypeVar("Made")


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
    factory: Callable[[Any], Any], optimizer: Optimizer, remake: Callable[[Any], Optimizer]
) -> Any:  # noqa: ANN401 - Lightning's own loose type
    """The scheduler of learning rates, tried for two steps on numbers of its own first.

    Args:
        factory: Makes it.
        optimizer: Whose learning rates it sets.
        remake: Makes another optimizer of that kind.

    Raises:
        ConfigError: If the scheduler refuses its settings, at once or in a step.
    """
    groups = [{"params": [torch.zeros(1)]} for _ in optimizer.param_groups]
    trial = _made("model.lr_scheduler", factory, remake(groups))
    for _ in range(2):
        trial.optimizer.step()
        _made("model.lr_scheduler", lambda scheduler: scheduler.step(), trial)
    return _made("model.lr_scheduler", factory, optimizer)


def _made(setting: str, factory: Callable[[Any], Made] | None, argument: Any) -> Made:  # noqa: ANN401
    if factory is None:
        raise ConfigError(f"{setting}: must be a class of torch with its settings, found null")
    try:
        return factory(argument)
    except Exception as error:  # whatever a third party's class makes of its settings
        raise ConfigError(
            f"{setting}: refused its settings: {error or type(error).__name__}"
        ) from error
