"""State of a run that was made in child processes: `ddp_notebook`, `ddp_fork`, `ddp_spawn`.

Lightning hands the weights and the logged numbers back to the parent process, and nothing else
that the children hold: averages, counts, clusters, results.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning as L

__all__ = ["HandsBack", "take_state_along"]

_KEY = "ant_lightning"


@runtime_checkable
class HandsBack(Protocol):
    """A module or a callback with state that outlives the process that made it."""

    def hand_back(self, trainer: L.Trainer) -> dict[str, Any]:
        """In a child: state for the object of the parent; its weights change after `fit` alone."""

    def take_back(self, state: dict[str, Any], pl_module: L.LightningModule) -> None:
        """In the parent: go on with the state of the child's copy of this object."""


def take_state_along() -> None:
    """Have Lightning's launcher of child processes hand our state back too.

    The parent makes the launcher before it knows the module, and calls neither module nor callbacks
    afterwards: there is no place but the launcher's class.
    """
    collect = _MultiProcessingLauncher.get_extra_results
    update = _MultiProcessingLauncher.update_main_process_results

    def get_extra_results(self: _MultiProcessingLauncher, trainer: L.Trainer) -> dict[str, Any]:
        states = [(name, each.hand_back(trainer)) for name, each in _holders(trainer)]
        buffer = io.BytesIO()  # the memory of a child's tensors cannot be shared
        torch.save(states, buffer)
        return {**collect(self, trainer), _KEY: buffer.getvalue()}

    def update_main_process_results(
        self: _MultiProcessingLauncher, trainer: L.Trainer, extra: dict[str, Any]
    ) -> None:
        update(self, trainer, extra)
        # Written by our own child a moment ago, so it may hold any object.
        file = io.BytesIO(extra[_KEY])
        states = torch.load(file, map_location="cpu", weights_only=False)
        for name, each in _holders(trainer):
            found = next((i for i, (other, _) in enumerate(states) if other == name), None)
            if found is not None:
                each.take_back(states.pop(found)[1], trainer.lightning_module)

    _MultiProcessingLauncher.get_extra_results = get_extra_results  # type: ignore[method-assign]
    _MultiProcessingLauncher.update_main_process_results = update_main_process_results  # type: ignore[method-assign]


def _holders(trainer: L.Trainer) -> Iterator[tuple[str, HandsBack]]:
    """Module and callbacks of ours by name; the lists of parent and child need not be equal."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    named = [("module", trainer.lightning_module), *((c.state_key, c) for c in callbacks)]
    for name, each in named:
        if isinstance(each, HandsBack):
            yield name, each
