"""Stop signals: a run that receives one finishes its step and saves a checkpoint."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.exceptions import SIGTERMException

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType
    from typing import Any

    import lightning as L

_NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
# With several ranks. They agree by a collective, for which the host waits.
_STEPS_BETWEEN_CHECKS = 8


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into `SIGTERMException` at a point that can be resumed.

    In training this point is the end of the step. With several ranks it is the end of every 8th
    step, at which all ranks stop if one of them received a signal. An evaluation on one process
    changes no training state and is broken off at once: sampling may take longer than the grace
    period of a cluster's scheduler. So is a command that does not train, on any number of ranks. A
    second Ctrl-C stops at once, without another checkpoint.

    It replaces Lightning's handlers. Those make ranks broadcast inside the handler, possibly during
    a collective of the step, and on SLURM save in the middle of a step.
    """

    def __init__(self) -> None:
        self.received = False
        self._number = int(signal.SIGTERM)
        self._trainer: L.Trainer | None = None
        self._num_held = 0  # depth of `held` blocks
        self._num_batches = 0
        self._before: dict[int, Any] = {}

    def listen(self, trainer: L.Trainer) -> None:
        """Install the handlers; Python allows this in the main thread only."""
        self._trainer = trainer
        self.received = False
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._handle) for each in _SIGNALS}

    def ignore(self) -> None:
        """Restore the previous handlers."""
        for each, handler in self._before.items():
            # `None`: the previous handler was not installed from Python.
            signal.signal(each, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context in which a signal raises nothing, because a file is being written."""
        self._num_held += 1
        try:
            yield
        finally:
            self._num_held -= 1

    def check(self, trainer: L.Trainer) -> None:
        """At the end of a step: stop if this rank or another received a signal.

        Raises:
            SIGTERMException: On every rank; its argument is the number of the signal.
        """
        stop = self.received
        if trainer.world_size > 1:
            self._num_batches += 1
            if self._num_batches % _STEPS_BETWEEN_CHECKS:
                return
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            raise SIGTERMException(self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; raise at a second Ctrl-C, or in an evaluation on one process."""
        if number == signal.SIGINT:
            if self.received:
                self.ignore()
                signal.default_int_handler(number, frame)
            if self._trainer is None or self._trainer.state.fn == "fit":
                print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        # In training this is all: `check` raises at the end of the step.
        self.received, self._number = True, number
        trainer = self._trainer
        if trainer is None or self._num_held:
            return
        # An evaluation inside a training of several ranks goes on: they stop together.
        inside = trainer.world_size == 1 and (trainer.validating or trainer.sanity_checking)
        if inside or trainer.state.fn != "fit":
            raise SIGTERMException(number)
