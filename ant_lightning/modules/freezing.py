"""Parameters that are frozen or thawed while a run trains, and how a resumed run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["TrainedParameters"]


class TrainedParameters:
    """Which parameters of a network need a gradient: at the start of a run, and in this step.

    What is thawed joins the optimizer's first group, which the scheduler of learning rates knows,
    unless somebody gave it to the optimizer in a group of its own, with its own learning rate. A
    checkpoint written after a change says so, and a run that starts as the first one did goes on
    with it.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, list[str]] | None = None
        self._start: list[str] | None = None
        self._optimized: set[str] = set()
        self._last: set[int] = set()

    def begin(self, network: nn.Module) -> list[nn.Parameter]:
        """The parameters of the optimizer's first group, in the network's order.

        Raises:
            ConfigError: If other parameters are trained than at the start of the checkpoint's run.
        """
        start = optimized = _trained(network)
        if self._loaded is not None:
            began, now = self._loaded["start"], self._loaded["now"]
            if start not in (began, now):
                odd = sorted(set(start) ^ set(began))
                raise ConfigError(
                    "model.backbone: a run must go on with the trained parameters that it began "
                    f"with, found {len(odd)} others, {odd[0]!r} among them"
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
        """Give the optimizer what was thawed since the last step; all parameters of the network."""
        parameters = list(network.parameters())
        trained = {id(p) for p in parameters if p.requires_grad}
        if self._start is not None and not trained <= self._last:
            first, *others = optimizer.param_groups
            elsewhere = {id(p) for group in others for p in group["params"]}
            own = {id(p) for p in first["params"]} | (trained - self._last - elsewhere)
            # In the network's order: a checkpoint's moments are told apart by their places.
            first["params"] = [p for p in parameters if id(p) in own]
            self._optimized = {n for n, p in network.named_parameters() if id(p) in own}
        self._last = trained
        return parameters

    def state(self, network: nn.Module) -> dict[str, list[str]] | None:
        """For a checkpoint: None if nothing was frozen or thawed since the start."""
        now = _trained(network)
        if self._start is None or now == self._start:
            return None
        return {"start": self._start, "now": now, "optimized": sorted(self._optimized)}

    def load(self, state: Any) -> None:  # noqa: ANN401 - of a file
        """Take what `state` gave, for `begin`.

        Raises:
            ConfigError: If it is something else.
        """
        if state is not None:
            names = ("start", "now", "optimized")
            lists = [state.get(name) for name in names] if isinstance(state, dict) else [None]
            if not all(isinstance(n, list) and all(type(s) is str for s in n) for n in lists):
                raise ConfigError(
                    f"ckpt_path: its trained parameters must be lists of names, found {state!r:.80}"
                )
        self._loaded = state


def _trained(network: nn.Module) -> list[str]:
    return [name for name, p in network.named_parameters() if p.requires_grad]
