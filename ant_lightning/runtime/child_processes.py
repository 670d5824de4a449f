"""Returns the state of child processes to their parent: `ddp_notebook`, `ddp_fork`, `ddp_spawn`.

Lightning itself returns only the weights and the logged numbers. Without this, averages, counts,
clusters and results would be lost when the children end.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning as L

_KEY = "ant_lightning"


@runtime_checkable
class HasChildState(Protocol):
    """A module or callback whose state must outlive the child process."""

    def child_state(self, trainer: L.Trainer) -> dict[str, Any]:
        """In a child: state for the parent's copy of this object.

        Return what belongs to trained weights after `fit` only: after other commands the parent
        keeps its weights.
        """

    def load_child_state(self, state: dict[str, Any], pl_module: L.LightningModule) -> None:
        """In the parent: take over the state of the child's copy of this object."""


def return_child_states() -> None:
    """Patch Lightning's launcher so that child processes return our state too.

    The parent creates the launcher before it knows the module, and calls neither module nor
    callbacks afterwards, so the launcher's class is the only place to hook in.
    """
    # The import of `ant_lightning.models` calls this once: a second call would wrap these twice.
    collect = _MultiProcessingLauncher.get_extra_results
    update = _MultiProcessingLauncher.update_main_process_results

    def get_extra_results(self: _MultiProcessingLauncher, trainer: L.Trainer) -> dict[str, Any]:
        states = [(name, each.child_state(trainer)) for name, each in _holders(trainer)]
        buffer = io.BytesIO()  # as bytes: a child's tensors end with it
        torch.save(states, buffer)
        return {**collect(self, trainer), _KEY: buffer.getvalue()}

    def update_main_process_results(
        self: _MultiProcessingLauncher, trainer: L.Trainer, extra: dict[str, Any]
    ) -> None:
        update(self, trainer, extra)
        # Safe to unpickle: our own child has just written it.
        file = io.BytesIO(extra[_KEY])
        states = torch.load(file, map_location="cpu", weights_only=False)
        for name, each in _holders(trainer):
            # Popped, because two callbacks may have the same key: the first goes to the first.
            found = next((i for i, (other, _) in enumerate(states) if other == name), None)
            if found is not None:
                each.load_child_state(states.pop(found)[1], trainer.lightning_module)

    _MultiProcessingLauncher.get_extra_results = get_extra_results  # type: ignore[method-assign]
    _MultiProcessingLauncher.update_main_process_results = update_main_process_results  # type: ignore[method-assign]


def _holders(trainer: L.Trainer) -> Iterator[tuple[str, HasChildState]]:
    """Our module and callbacks, each with a name.

    By name, because the lists may differ: a module adds callbacks in the child only.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    named = [("module", trainer.lightning_module), *((c.state_key, c) for c in callbacks)]
    for name, each in named:
        if isinstance(each, HasChildState):
            yield name, each
