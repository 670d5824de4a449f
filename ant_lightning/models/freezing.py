"""Parameters that are frozen or thawed during training, and how a resumed run restores them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ant_lightning.errors import ConfigError
from ant_lightning.models.optimizers import NETWORK

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class TrainedParameters:
    """Which parameters of a network need a gradient, at the start of a run and at each step.

    Thawed parameters join the optimizer's group that is theirs (the first, without `param_groups`)
    and follow its learning-rate schedule, unless
    the user already added them to another group with its own learning rate. Checkpoints store a
    change, and a resumed run that starts with the original parameters restores it.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, list[str]] | None = None  # from a checkpoint, until `begin`
        self._start: list[str] | None = None  # names trained at the start of the run
        self._optimized: set[str] = set()  # names in the optimizer's groups of the network
        self._places: dict[int, int] = {}  # which of these groups each parameter belongs to, by id
        self._last: set[int] = set()  # ids of the parameters trained in the last step

    def begin(self, network: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave in each group of the network's parameters those that are trained, in its order.

        Raises:
            ConfigError: If the trained parameters are neither those at the start of the
                checkpoint's run nor those when it was written.
        """
        start = optimized = _trained(network)
        if self._loaded is not None:
            began, now = self._loaded["start"], self._loaded["now"]
            # Either a new module, frozen as at the start of that run, or one that already has the
            # state in which the checkpoint was written.
            if start not in (began, now):
                odd = sorted(set(start) ^ set(began))
                raise ConfigError(
                    "backbone: a resumed run must train the same parameters as at its start, "
                    f"found {len(odd)} that differ, such as {odd[0]!r}"
                )
            for name, p in network.named_parameters():
                p.requires_grad_(name in now)
            start, optimized = began, self._loaded["optimized"]
            self._loaded = None
        self._start, self._optimized = start, set(optimized)
        named = list(network.named_parameters())
        self._last = {id(p) for _, p in named if p.requires_grad}
        self._places = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        own = {id(p) for name, p in named if name in self._optimized}
        return [
            {**group, "params": self._of_place(place, network, own)}
            for place, group in enumerate(groups)
        ]

    def _of_place(self, place: int, network: nn.Module, own: set[int]) -> list[nn.Parameter]:
        """Those of `own` that belong to a group, in the network's order."""
        # Its order, because a checkpoint identifies moments by their position.
        return [
            p for p in network.parameters() if id(p) in own and self._places.get(id(p), 0) == place
        ]

    def follow(self, network: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
        """Add parameters thawed since the last step to the optimizer.

        Returns:
            All parameters of the network.
        """
        parameters = list(network.parameters())
        trained = {id(p) for p in parameters if p.requires_grad}
        if self._start is not None and not trained <= self._last:
            every = list(enumerate(optimizer.param_groups))
            groups = [g for i, g in every if not i or g.get("role") == NETWORK]
            others = [g for i, g in every if i and g.get("role") != NETWORK]
            elsewhere = {id(p) for group in others for p in group["params"]}
            inside = {id(p) for group in groups for p in group["params"]}
            own = inside | (trained - self._last - elsewhere)
            for place, group in enumerate(groups):
                group["params"] = self._of_place(place, network, own)
            self._optimized = {n for n, p in network.named_parameters() if id(p) in own}
        self._last = trained
        return parameters

    def state(self, network: nn.Module) -> dict[str, list[str]] | None:
        """State for a checkpoint; `None` if nothing was frozen or thawed since the start."""
        now = _trained(network)
        if self._start is None or now == self._start:
            return None
        return {"start": self._start, "now": now, "optimized": sorted(self._optimized)}

    def load(self, state: dict[str, list[str]] | None) -> None:
        """Keep what `state` returned, for `begin`."""
        self._loaded = state


def _trained(network: nn.Module) -> list[str]:
    return [name for name, p in network.named_parameters() if p.requires_grad]
