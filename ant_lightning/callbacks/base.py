"""State of a callback that belongs to one run.

It is reset when another run starts, and returned to the parent by a child process.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["RunCallback", "steps_of"]


class RunCallback(L.Callback):
    """A callback whose state belongs to one run, although several runs may use the object.

    A run is the training of one module and the evaluations of that module. Another module, or
    training that starts at step 0, is another run: the state is reset to its initial values, and
    when a run is resumed its checkpoint then fills it.

    Attributes:
        of_run: Names of the attributes that hold the state, each with a factory of its initial
            value.
    """

    of_run: ClassVar[Mapping[str, Callable[[], Any]]] = {}

    def __init__(self) -> None:
        # Weak: otherwise the callback would keep the module and its GPU memory alive.
        self._module: weakref.ref[L.LightningModule] | None = None
        self.forget()

    def forget(self) -> None:
        """Reset the state to its initial values."""
        for name, make in self.of_run.items():
            setattr(self, name, make())

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reset the state if another run starts; runs before a checkpoint is loaded."""
        same = self._module is not None and self._module() is pl_module
        if not same or (stage == "fit" and trainer.global_step == 0):
            self.forget()
        self._module = weakref.ref(pl_module)

    def hand_back(self, trainer: L.Trainer) -> dict[str, Any]:
        """In a child process: the state, for the parent's copy of this object."""
        return {name: getattr(self, name) for name in self.of_run}

    def take_back(self, state: dict[str, Any], pl_module: L.LightningModule) -> None:
        """In the parent: take over the state of the child's copy of this object."""
        vars(self).update(state)
        self._module = weakref.ref(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": None}  # a weak reference cannot be pickled


def steps_of(trainer: L.Trainer, pl_module: Any) -> int:  # noqa: ANN401 - also an autoencoder
    """Number of optimizer steps that trained the weights.

    In an evaluation the module's own count is used: the trainer may have trained another module
    before.
    """
    if trainer.state.fn == "fit":
        return trainer.global_step
    return int(getattr(pl_module, "trained_steps", 0))
