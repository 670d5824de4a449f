"""The optimizer and the learning rates of a run."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim import LBFGS, SparseAdam
from torch.optim.lr_scheduler import LambdaLR

from ant_lightning.balancing.parameters import names_of
from ant_lightning.errors import ConfigError
from ant_lightning.models.parameter_groups import checked_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning as L
    from torch import nn
    from torch.optim import Optimizer

    from ant_lightning.balancing.base import Balancer
    from ant_lightning.models.settings import Optimization

Made = TypeVar("Made")

# The `role` of groups that follow the scheduler, as the first does, which has none: that of an
# auxiliary term, with the settings of the first, and others of the backbone, with settings of
# their own. The balancer's group has no role.
HEAD, NETWORK = "head", "network"


@dataclass(eq=False)
class OptimizerFactory:
    """Makes the optimizer and the scheduler of a module.

    Args:
        settings: How the weights are optimised.
        path: Path of `settings` among the arguments of the module, for messages.
        balancer: Its parameters, if any, form a group of the optimizer, whose learning rate is
            `balancer.lr`.
        network: Whose parameters `settings.param_groups` puts into groups.
    """

    settings: Optimization
    _: KW_ONLY
    path: str = ""
    balancer: Balancer | None = None
    network: nn.Module | None = None

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
        self._check_keys(optimizer, groups)
        factory: Any = self.settings.lr_scheduler
        if steps := self.settings.warmup_steps:
            # step + 1: with a rate of 0 the first step would change nothing.
            factory = partial(LambdaLR, lr_lambda=lambda step: min(1.0, (step + 1) / steps))
        if factory is None:
            return optimizer, None
        self._try_scheduler(factory, None if trainer is None else _planned_steps(trainer))
        with _backbone_only(optimizer):
            return optimizer, self._made("lr_scheduler", factory, optimizer)

    def _check_keys(self, optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
        """Check that an optimizer of torch knows what `param_groups` set: it ignores the rest."""
        if self.settings.param_groups is None or "torch.optim" not in type(optimizer).__module__:
            return
        known = {*optimizer.defaults, "params", "role"}
        for group in (groups[0], *(each for each in groups[1:] if each.get("role") == NETWORK)):
            for name in sorted(group.keys() - known):
                raise ConfigError(
                    f"{self.path}param_groups: must have settings of {type(optimizer).__name__}, "
                    f"found {name} of {type(self.settings.param_groups).__name__}"
                )

    def step(self, scheduler: Any) -> None:  # noqa: ANN401 - Lightning's own loose type
        """Set the backbone's learning rate for the next step.

        The balancer's parameters keep `balancer.lr`: the peak, floor and decay of a scheduler are
        meant for the network.

        Raises:
            ConfigError: If the scheduler has no learning rate for that step.
        """
        with _backbone_only(scheduler.optimizer):
            self._made("lr_scheduler", lambda each: each.step(), scheduler)

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

    def members(self) -> list[str]:
        """A hash of the names in each group: their order in the groups numbers the moments."""
        assert self.network is not None, "the factory has no network"
        parameters = list(self.network.parameters())
        names = dict(zip(map(id, parameters), names_of(parameters, self.network), strict=True))
        every = ["\n".join(names[id(p)] for p in group["params"]) for group in self.groups()]
        return [hashlib.blake2b(each.encode(), digest_size=8).hexdigest() for each in every]

    def kind(self) -> str:
        """Class of the optimizer."""
        return type(self.own_trial()[0]).__name__

    def own_trial(self) -> tuple[Optimizer, Any]:
        """Optimizer and scheduler of throwaway parameters, one per group of these settings."""
        own = self.balancer is not None and any(True for _ in self.balancer.parameters())
        others = [NETWORK] * (len(self._trial_groups()) - 1)
        return self.trial([None, *others, *[None] * own])

    def trial(self, roles: list[str | None]) -> tuple[Optimizer, Any]:
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
