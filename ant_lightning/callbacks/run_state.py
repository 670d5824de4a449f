"""What a callback keeps of a run: forgotten when another run begins, handed back by a child."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["RunCallback", "steps_of"]


class RunCallback(L.Callback):
    """A callback whose state belongs to one run, although the object may serve several.

    A run is a training of one module, with the evaluations of that module. Another module, or a
    training that starts at step 0, begins another run and finds the state as it was made; a
    checkpoint that is resumed fills it afterwards.

    Attributes:
        of_run: The attributes that hold the state, each with what makes its first value.
    """

    of_run: ClassVar[Mapping[str, Callable[[], Any]]] = {}

    def __init__(self) -> None:
        # Weak, or a callback would keep a module and its GPU memory alive.
        self._module: weakref.ref[L.LightningModule] | None = None
        self.forget()

    def forget(self) -> None:
        """Have nothing of any run."""
        for name, make in self.of_run.items():
            setattr(self, name, make())

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget another run; this comes before a checkpoint is loaded."""
        same = self._module is not None and self._module() is pl_module
        if not same or (stage == "fit" and trainer.global_step == 0):
            self.forget()
        self._module = weakref.ref(pl_module)

    def hand_back(self, trainer: L.Trainer) -> dict[str, Any]:
        """In a child process: the state, for the object of the parent."""
        return {name: getattr(self, name) for name in self.of_run}

    def take_back(self, state: dict[str, Any], pl_module: L.LightningModule) -> None:
        """In the parent: go on with the state of the child's copy of this object."""
        vars(self).update(state)
        self._module = weakref.ref(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": None}  # a weak reference cannot be pickled


def steps_of(trainer: L.Trainer, pl_module: Any) -> int:  # noqa: ANN401 - also an autoencoder
    """Optimizer steps behind the weights.

    In an evaluation the module counts: the trainer may have trained another one before.
    """
    if trainer.state.fn == "fit":
        return trainer.global_step
    return int(getattr(pl_module, "trained_steps", 0))
