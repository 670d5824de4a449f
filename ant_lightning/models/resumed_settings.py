"""How a resumed run takes other settings of optimizer, scheduler and balancer."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.balancing.linear import LinearScalarization
from ant_lightning.errors import ConfigError
from ant_lightning.files.identity import differences
from ant_lightning.models.optimizers import NETWORK

if TYPE_CHECKING:
    import lightning as L
    from torch.optim import Optimizer

    from ant_lightning.balancing.base import Balancer
    from ant_lightning.models.optimizers import OptimizerFactory

_MEMBERS = "param_groups.members"

# Entries of a scheduler's state that are not settings: counts, and values from the optimizer.
_NOT_SETTINGS = {
    "_get_lr_called_within_step",
    "_is_initial",
    "_last_lr",
    "_step_count",
    "base_lrs",
    "last_epoch",
    "lr_lambdas",
}


class OptimizerSettings:
    """The settings of optimizer and scheduler as a checkpoint stores them, and their change.

    Args:
        factory: Makes optimizer and scheduler from the settings of this run.
    """

    def __init__(self, factory: OptimizerFactory) -> None:
        self.factory = factory
        self.path = factory.path

    def described(self) -> dict[str, Any]:
        """The settings of optimizer and scheduler by name, as plain values for a checkpoint.

        They are read off throwaway objects, so that defaults of torch are included.
        """
        optimizer, scheduler = self.factory.own_trial()
        warmup_steps = self.factory.settings.warmup_steps
        found = _of_groups(optimizer.state_dict()["param_groups"])
        found["lr_scheduler"] = (
            None if warmup_steps or scheduler is None else type(scheduler).__name__
        )
        found["warmup_steps"] = warmup_steps
        if self.factory.settings.param_groups is not None:
            found[_MEMBERS] = self.factory.members()
        if scheduler is not None:
            found |= _of_scheduler(scheduler.state_dict())
        # Through JSON: a checkpoint, loaded with `weights_only`, may hold plain values only.
        plain: dict[str, Any] = json.loads(
            json.dumps(found, default=lambda each: type(each).__name__)
        )
        return plain

    def resume(
        self, trainer: L.Trainer, checkpoint: dict[str, Any], stored: dict[str, Any] | None
    ) -> None:
        """Make the settings of this run override those in a checkpoint, and print what changed.

        The optimizer keeps its moments. The learning rates are those that a run with the current
        settings would have after the same number of steps. If nothing changed, the checkpoint is
        left untouched, so that a resumed run equals an uninterrupted one.

        Args:
            trainer: The trainer of the resumed run.
            checkpoint: As Lightning loaded it; its optimizer and scheduler states are replaced.
            stored: The result of `described` in the checkpoint; `None` for one of version 0.1.

        Raises:
            ConfigError: If a setting needs state that the checkpoint does not hold.
        """
        changed = self._apply(checkpoint, stored)
        if trainer.is_global_zero:
            say_changed({f"model.{self._setting(name)}": pair for name, pair in changed.items()})

    def _setting(self, name: str) -> str:
        """Path of a setting among the arguments of the module."""
        return f"tasks.{name}" if name.startswith("balancer.") else self.path + name

    def _apply(
        self, checkpoint: dict[str, Any], stored: dict[str, Any] | None
    ) -> dict[str, tuple[Any, Any]]:
        """Update the states of optimizer and scheduler if their settings changed."""
        states = checkpoint.get("optimizer_states") or []
        if len(states) != 1:  # files of weights alone have none
            return {}
        groups = states[0]["param_groups"]
        schedulers = checkpoint.get("lr_schedulers") or []
        current = self.described()
        if stored is None:  # 0.1: compare what the states show, and assume the rest unchanged
            stored = _of_groups(groups) | (_of_scheduler(schedulers[0]) if schedulers else {})
            scheduled = current["lr_scheduler"] or current["warmup_steps"]
            if bool(scheduled) != bool(schedulers):
                stored |= {"lr_scheduler": "one" if schedulers else None}
            current = {name: current[name] for name in current if name in stored}
            stored = {name: stored[name] for name in current}
        changed = differences(stored, current)
        if not changed:
            return {}
        if _MEMBERS in changed:
            raise ConfigError(
                f"{self.path}param_groups: must put the same parameters into the same groups as "
                "the run of the checkpoint did, found others"
            )
        optimizer, scheduler = self.factory.trial([group.get("role") for group in groups])
        self._check_state(states[0]["state"], optimizer, changed)
        if scheduler is not None:
            self._advance(scheduler, int(checkpoint["global_step"]))
        fresh = optimizer.state_dict()["param_groups"]
        for group, now in zip(groups, fresh, strict=True):
            params = group["params"]  # positions of the parameters, which index the moments
            group.clear()
            group.update(now, params=params)
        checkpoint["lr_schedulers"] = [] if scheduler is None else [scheduler.state_dict()]
        return changed

    def _advance(self, scheduler: Any, num_steps: int) -> None:  # noqa: ANN401 - of torch
        """Step a new scheduler as often as the checkpoint's run did."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")
                # Step by step: most schedulers of torch compute a rate from the one before.
                for _ in range(num_steps):
                    self.factory.step(scheduler)
        except ConfigError as error:  # a schedule that is over
            raise ConfigError(
                f"{self.path}lr_scheduler: must last longer than the {num_steps} steps of the "
                f"checkpoint, found: {error.__cause__}"
            ) from error

    def _check_state(
        self,
        stored: dict[int, dict[str, Any]],
        optimizer: Optimizer,
        changed: dict[str, tuple[Any, Any]],
    ) -> None:
        """Refuse settings whose optimizer state is not in the checkpoint, such as `amsgrad`."""
        # A step on zero gradients makes the optimizer create the state that it needs.
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        kept = {name for each in stored.values() for name in each}
        # If the old optimizer kept no state (SGD without momentum), the new one starts its own.
        if kept and {name for p in parameters for name in optimizer.state[p]} - kept:
            named = (item for item in changed.items() if item[0].startswith("optimizer."))
            name, (then, now) = next(named, ("optimizer", ("another", "this one")))
            raise ConfigError(
                f"{self.path}{name}: must stay {then} in a resumed run, because the checkpoint "
                f"holds no state for another value, found {now}"
            )


def say_changed(changed: dict[str, tuple[Any, Any]]) -> None:
    """Print one line for each setting that differs from the checkpoint's."""
    for name, (then, now) in changed.items():
        print(changed_line(name, then, now), flush=True)


def changed_line(name: str, then: object, now: object, *, effect: str = "from now on") -> str:
    """What a resumed run says of a setting that differs from the checkpoint's."""
    return f"{name}: {now} {effect}, the checkpoint has {then}"


def keep_fixed_weights(
    balancer: Balancer | None, checkpoint: dict[str, Any], *, trainer: L.Trainer
) -> None:
    """Make the weights of `LinearScalarization` in the settings override the stored ones."""
    name = "balancer.weights"
    stored = checkpoint["state_dict"].get(name)
    if not isinstance(balancer, LinearScalarization) or stored is None:
        return
    checkpoint["state_dict"][name] = balancer.weights.clone()
    then, now = stored.tolist(), balancer.weights.tolist()
    if then != now and trainer.is_global_zero:
        say_changed({"model.tasks.balancer.weights": (then, now)})


def _of_groups(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The optimizer settings of the network's groups, and the learning rate of the balancer's."""
    found: dict[str, Any] = {}
    own = [groups[0], *(group for group in groups[1:] if group.get("role") == NETWORK)]
    for place, group in enumerate(own):
        path = f"param_groups.{place}" if place else "optimizer"
        found |= {
            f"{path}.{name}": value
            for name, value in group.items()
            if name not in {"params", "initial_lr", "param_names", "role"}
        }
        # A scheduler moves the setting to `initial_lr` and changes `lr` in every step.
        found[f"{path}.lr"] = group.get("initial_lr", group["lr"])
    for group in [each for each in groups[1:] if "role" not in each][:1]:
        found["balancer.lr"] = group.get("initial_lr", group["lr"])
    return found


def _of_scheduler(state: dict[str, Any]) -> dict[str, Any]:
    return {
        f"lr_scheduler.{name}": value
        for name, value in state.items()
        if name not in _NOT_SETTINGS and isinstance(value, bool | int | float | str | list | tuple)
    }
