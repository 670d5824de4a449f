"""The optimizer and the learning rates of a run, and how a resumed run takes new settings."""

from __future__ import annotations

import hashlib
import json
import warnings
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.optim import LBFGS, SparseAdam
from torch.optim.lr_scheduler import LambdaLR

from ant_lightning.balancing.parameters import names_of
from ant_lightning.errors import ConfigError
from ant_lightning.files.identity import differences
from ant_lightning.models.parameter_groups import checked_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning as L
    from torch import nn
    from torch.optim import Optimizer

    from ant_lightning.balancing.base import Balancer
    from ant_lightning.models.settings import Optimization

__all__ = [
    "HEAD",
    "NETWORK",
    "OptimizerFactory",
    "back_off",
    "gradient_scaler",
    "loss_scale",
    "say_changed",
]

Made = TypeVar("Made")

# The `role` of groups that follow the scheduler, as the first does, which has none: that of an
# auxiliary term, with the settings of the first, and others of the backbone, with settings of
# their own. The balancer's group has no role.
HEAD, NETWORK = "head", "network"

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


class OptimizerFactory:
    """Makes the optimizer and the scheduler of a module, and applies changed settings on a resume.

    Args:
        settings: How the weights are optimised.
        path: Path of `settings` among the arguments of the module, for messages.
        balancer: Its parameters, if any, form a group of the optimizer, whose learning rate is
            `balancer.lr`.
        network: Whose parameters `settings.param_groups` puts into groups.
    """

    def __init__(
        self,
        settings: Optimization,
        *,
        path: str = "",
        balancer: Balancer | None = None,
        network: nn.Module | None = None,
    ) -> None:
        self.settings = settings
        self.path = path
        self.balancer = balancer
        self.network = network

    def groups(self) -> list[dict[str, Any]]:
        """The groups of the network's parameters, frozen ones too; one without `param_groups`.

        Raises:
            ConfigError: If `param_groups` fails, or does not put each parameter into one group.
        """
        assert self.network is not None, "the factory has no network"
        parameters = list(self.network.parameters())
        if self.settings.param_groups is None:
            return [{"params": parameters}]
        named = list(zip(names_of(parameters, self.network), parameters, strict=True))
        made = self._made("param_groups", self.settings.param_groups, named)
        try:
            first, *others = checked_groups(made, named)
        except ConfigError as error:
            raise ConfigError(f"{self.path}{error}") from error
        return [first, *({**group, "role": NETWORK} for group in others)]

    def _trial_groups(self) -> list[dict[str, Any]]:
        """The same with a throwaway parameter each, a matrix in a group of matrices."""
        if self.settings.param_groups is None:
            return [{"params": [torch.zeros(1, requires_grad=True)]}]
        return [
            {
                **group,
                "params": [
                    torch.zeros(
                        (1, 1) if all(p.ndim == 2 for p in group["params"]) else (1,),
                        requires_grad=True,
                    )
                ],
            }
            for group in self.groups()
        ]

    def make(self, groups: Any, *, trainer: L.Trainer | None = None) -> tuple[Optimizer, Any]:  # noqa: ANN401
        """The optimizer, and its scheduler or `None`.

        Step the scheduler with `step`, which hides the balancer's group from it.

        Args:
            groups: Parameters, or the parameter groups of the backbone and the balancer.
            trainer: The run, which must not be longer than the schedule; `None` skips the check.

        Raises:
            ConfigError: If the optimizer or the scheduler refuses its settings, when constructed or
                in a step; if the optimizer cannot make its step from gradients that are already
                computed; or if the schedule ends before the run does.
        """
        groups = list(groups)
        for group in groups[1:]:
            if self.balancer is not None and "role" not in group:
                group |= {"lr": self.balancer.lr, "weight_decay": 0.0}
        optimizer = self._made("optimizer", self.settings.optimizer, groups)
        # LBFGS must evaluate the loss again within a step; SparseAdam takes sparse gradients only.
        if isinstance(optimizer, LBFGS | SparseAdam):
            raise ConfigError(
                f"{self.path}optimizer: must make its step from one gradient of ordinary tensors, "
                f"as AdamW and SGD do, found {type(optimizer).__name__}"
            )
        factory: Any = self.settings.lr_scheduler
        if steps := self.settings.warmup_steps:
            # step + 1: with a rate of 0 the first step would change nothing.
            factory = partial(LambdaLR, lr_lambda=lambda step: min(1.0, (step + 1) / steps))
        if factory is None:
            return optimizer, None
        self._try_scheduler(factory, None if trainer is None else _planned_steps(trainer))
        with _backbone_only(optimizer):
            return optimizer, self._made("lr_scheduler", factory, optimizer)

    def step(self, scheduler: Any) -> None:  # noqa: ANN401 - Lightning's own loose type
        """Set the backbone's learning rate for the next step.

        The balancer's parameters keep `balancer.lr`: the peak, floor and decay of a scheduler are
        meant for the network.

        Raises:
            ConfigError: If the scheduler has no learning rate for that step.
        """
        with _backbone_only(scheduler.optimizer):
            self._made("lr_scheduler", lambda each: each.step(), scheduler)

    def described(self) -> dict[str, Any]:
        """The settings of optimizer and scheduler by name, as plain values for a checkpoint.

        They are read off throwaway objects, so that defaults of torch are included.
        """
        optimizer, scheduler = self._own_trial()
        warmup_steps = self.settings.warmup_steps
        found = _of_groups(optimizer.state_dict()["param_groups"])
        found["lr_scheduler"] = (
            None if warmup_steps or scheduler is None else type(scheduler).__name__
        )
        found["warmup_steps"] = warmup_steps
        if self.settings.param_groups is not None:
            found[_MEMBERS] = self._members()
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

    def _try_scheduler(self, factory: Callable[[Any], Any], num_steps: float | None) -> None:
        """Make and step the scheduler on a throwaway optimizer, so that bad settings fail early."""
        throwaway = self._made("optimizer", self.settings.optimizer, self._trial_groups())
        trial = self._made("lr_scheduler", factory, throwaway)
        total = getattr(trial, "total_steps", None)
        if total is not None and num_steps is not None and total < num_steps:
            steps = (
                "without trainer.max_steps"
                if num_steps == float("inf")
                else f"of {num_steps} steps"
            )
            raise ConfigError(
                f"{self.path}lr_scheduler.total_steps: must be at least the steps of the run, as "
                f"there is no learning rate after them, found {total} in a run {steps}"
            )
        for _ in range(2 if total is None else min(2, total)):
            trial.optimizer.step()
            self._made("lr_scheduler", lambda scheduler: scheduler.step(), trial)

    def _made(self, name: str, factory: Callable[[Any], Made], argument: Any) -> Made:  # noqa: ANN401
        try:
            return factory(argument)
        except Exception as error:  # whatever a third party's class makes of its settings
            raise ConfigError(
                f"{self.path}{name}: refused its settings: {error or type(error).__name__}"
            ) from error

    def _members(self) -> list[str]:
        """A hash of the names in each group: their order in the groups numbers the moments."""
        assert self.network is not None, "the factory has no network"
        parameters = list(self.network.parameters())
        names = dict(zip(map(id, parameters), names_of(parameters, self.network), strict=True))
        every = ["\n".join(names[id(p)] for p in group["params"]) for group in self.groups()]
        return [hashlib.blake2b(each.encode(), digest_size=8).hexdigest() for each in every]

    def kind(self) -> str:
        """Class of the optimizer."""
        return type(self._own_trial()[0]).__name__

    def _own_trial(self) -> tuple[Optimizer, Any]:
        """Optimizer and scheduler of throwaway parameters, one per group of these settings."""
        own = self.balancer is not None and any(True for _ in self.balancer.parameters())
        others = [NETWORK] * (len(self._trial_groups()) - 1)
        return self._trial([None, *others, *[None] * own])

    def _trial(self, roles: list[str | None]) -> tuple[Optimizer, Any]:
        """Optimizer and scheduler of throwaway parameters, one per group."""
        groups = self._trial_groups()
        found = 1 + roles.count(NETWORK)
        if len(groups) != found:
            raise ConfigError(
                f"{self.path}param_groups: must make the {found} groups of the checkpoint, "
                f"found {len(groups)}"
            )
        first, *others = groups
        made = [first]
        for role in roles[1:]:
            if role == NETWORK:
                made.append(others.pop(0))
            else:
                made.append({"params": [torch.zeros(1, requires_grad=True)]})
                made[-1] |= {"role": role} if role else {}
        return self.make(made)

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
        optimizer, scheduler = self._trial([group.get("role") for group in groups])
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
                    self.step(scheduler)
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


def say_changed(changed: dict[str, tuple[Any, Any]], *, effect: str = "from now on") -> None:
    """Print one line for each setting that differs from the checkpoint's."""
    for name, (then, now) in changed.items():
        print(f"{name}: {now} {effect}, the checkpoint has {then}", flush=True)


@contextmanager
def _backbone_only(optimizer: Optimizer) -> Iterator[None]:
    """Hide the balancer's group: schedulers change every group they see."""
    groups = optimizer.param_groups
    optimizer.param_groups = [
        group for place, group in enumerate(groups) if not place or "role" in group
    ]
    try:
        yield
    finally:
        optimizer.param_groups = groups


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


def _planned_steps(trainer: L.Trainer) -> float | None:
    """Optimizer steps after which a run ends; infinity without a limit, `None` if unknown.

    Not `Trainer.estimated_stepping_batches`: it would set up the loader before a checkpoint
    restores the loader's position.
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


def gradient_scaler(trainer: L.Trainer) -> torch.amp.GradScaler | None:
    """The scaler of `precision="16-mixed"`; `None` for every other precision."""
    return getattr(trainer.precision_plugin, "scaler", None)


def loss_scale(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | float:
    """The factor of the losses before differentiation; the host does not wait for the device."""
    if scaler is None:
        return 1.0
    return scaler.scale(torch.ones((), device=device, dtype=torch.float32))


def back_off(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
    """Shrink the scale as after an overflow, without an optimizer step.

    A skipped step has removed its gradients, so the scaler is given one infinite gradient instead.
    """
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.full_like(parameter, torch.inf)
    scaler.unscale_(optimizer)
    scaler.update()
    parameter.grad = None
