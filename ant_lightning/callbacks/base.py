"""The base of all callbacks: typed hooks, and state that belongs to one run."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import lightning as L

from ant_lightning.errors import ConfigError
from ant_lightning.models.module import MultiTaskDiffusion

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    # Lightning types a hook's module as any LightningModule. With this base, which type checkers
    # accept as a Callback, a hook can name the class that `RunCallback.setup` has checked.
    class Callback(Any):  # type: ignore[misc]
        """A callback of Lightning."""
else:
    from lightning import Callback

C = TypeVar("C")


class RunCallback(Callback):
    """A callback for one kind of module, with state that belongs to one run.

    A run is the training of one module and the evaluations of that module. Another module, or
    training that starts at step 0, is another run: the state is reset to its initial values, and
    when a run is resumed its checkpoint then fills it.

    Attributes:
        module_type: Class of the modules that the callback works with.
        run_state: Names of the attributes that hold the state, each with a factory of its initial
            value.

    Raises:
        ConfigError: In `setup`, if the module is of another class.
    """

    module_type: ClassVar[type[L.LightningModule]] = MultiTaskDiffusion
    run_state: ClassVar[Mapping[str, Callable[[], Any]]] = {}

    def __init__(self) -> None:
        # Weak: otherwise the callback would keep the module and its GPU memory alive.
        self._module: weakref.ref[L.LightningModule] | None = None
        self.reset()

    def reset(self) -> None:
        """Reset the state to its initial values."""
        for name, make in self.run_state.items():
            setattr(self, name, make())

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:  # noqa: ANN401
        """Check the module; reset the state if another run starts. A checkpoint is loaded later."""
        if not isinstance(pl_module, self.module_type):
            raise ConfigError(
                f"model: must be a {self.module_type.__name__} for {type(self).__name__}, "
                f"found {type(pl_module).__name__}"
            )
        same = self._module is not None and self._module() is pl_module
        if not same or (stage == "fit" and trainer.global_step == 0):
            self.reset()
        self._module = weakref.ref(pl_module)

    def child_state(self, trainer: L.Trainer) -> dict[str, Any]:
        """In a child process: the state, for the parent's copy of this object."""
        return {name: getattr(self, name) for name in self.run_state}

    def load_child_state(self, state: dict[str, Any], pl_module: L.LightningModule) -> None:
        """In the parent: take over the state of the child's copy of this object."""
        self.__dict__.update(state)
        self._module = weakref.ref(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": None}  # a weak reference cannot be pickled


def callback_of(trainer: L.Trainer, kind: type[C]) -> C | None:
    """The trainer's first callback of a class, or `None`."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, kind)), None)


def steps_of(trainer: L.Trainer, pl_module: Any) -> int:  # noqa: ANN401 - also an autoencoder
    """Number of optimizer steps that trained the weights.

    In an evaluation the module's own count is used: the trainer may have trained another module
    before.
    """
    if trainer.state.fn == "fit":
        return trainer.global_step
    return int(getattr(pl_module, "trained_steps", 0))
