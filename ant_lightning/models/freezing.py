"""Parameters that are frozen or thawed during training, and how a resumed run restores them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["TrainedParameters"]


class TrainedParameters:
    """Which parameters of a network need a gradient, at the start of a run and at each step.

    Thawed parameters join the optimizer's first group and follow its learning-rate schedule, unless
    the user already added them to another group with its own learning rate. Checkpoints store a
    change, and a resumed run that starts with the original parameters restores it.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, list[str]] | None = None  # from a checkpoint, until `begin`
        self._start: list[str] | None = None  # names trained at the start of the run
        self._optimized: set[str] = set()  # names in the optimizer's first group
        self._last: set[int] = set()  # ids of the parameters trained in the last step

    def begin(self, network: nn.Module) -> list[nn.Parameter]:
        """The parameters of the optimizer's first group, in the network's order.

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
        return [p for name, p in named if name in self._optimized]

    def follow(self, network: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
        """Add parameters thawed since the last step to the optimizer.

        Returns:
            All parameters of the network.
        """
        parameters = list(network.parameters())
        trained = {id(p) for p in parameters if p.requires_grad}
        if self._start is not None and not trained <= self._last:
            first, *others = optimizer.param_groups
            elsewhere = {id(p) for group in others for p in group["params"]}
            own = {id(p) for p in first["params"]} | (trained - self._last - elsewhere)
            # In the network's order, because a checkpoint identifies moments by their position.
            first["params"] = [p for p in parameters if id(p) in own]
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
