"""A rank that fails tells the others why, so that none of them waits for it forever."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from typing import TYPE_CHECKING
from uuid import uuid4

import lightning as L
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn

from ant_lightning.errors import message_of

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_log = logging.getLogger(__name__)
_PREFIX = "ranks: "
# Messages of gloo and NCCL about a lost rank; they depend on how far the collective had come.
_LOST = re.compile(
    r"gloo/|connection (?:closed|reset) by peer|remote worker|nccl(?:RemoteError|SystemError)",
    re.IGNORECASE,
)


class RankWatch(L.Callback):
    """Ends all ranks of a run within a bounded time of the first error of any of them.

    - A rank that raises writes its error to the store of the process group, and waits a moment
      (`10 poll` seconds at most) for the others to read it.
    - A rank that fails because another is gone raises with a note that quotes the first error.
    - A rank that is stuck in a collective ends its process `grace` seconds after it has read the
      error: NCCL does not notice that a rank is gone.
    - A rank that is killed writes no error: the others say that they lost a rank, or the launcher
      ends them.

    On one process it does nothing. See docs/decisions/030.

    Args:
        poll: Seconds between two looks at the store.
        grace: Seconds that a rank has to end by itself.
    """

    def __init__(self, *, poll: float = 0.5, grace: float = 30.0) -> None:
        self.poll = poll
        self.grace = grace
        self._key = ""
        self._first: str | None = None
        self._stop = threading.Event()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start the thread that watches the store."""
        self._stop.set()  # ends the thread of an earlier run
        if not several_ranks():
            return
        warn_of_shared_store()
        # A new key for every run: torchrun's store outlives the ranks that it restarts, and with it
        # the error of the run before.
        self._key = f"ant_lightning/failed/{trainer.strategy.broadcast(uuid4().hex)}"
        self._first, self._stop = None, threading.Event()
        threading.Thread(
            target=self._watch, args=(_store(), self._stop), name="rank-watch", daemon=True
        ).start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """End the thread."""
        self._stop.set()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Tell the other ranks, or note which rank failed first."""
        self._stop.set()
        # Only errors: a signal (no `Exception`) reaches all ranks and is the failure of none.
        if not self._key or not several_ranks() or not isinstance(exception, Exception):
            return
        rank, text = dist.get_rank(), message_of(exception)
        lost = isinstance(exception, dist.DistError) or bool(
            isinstance(exception, RuntimeError) and _LOST.search(text)
        )
        own = f"rank {rank}: {type(exception).__name__}: {text}"
        if lost:
            own = f"rank {rank} lost another rank, which was killed or left no error ({text})"
        try:
            # A rank that lost another does not expect that one to read the error.
            first = self._tell(own, others=dist.get_world_size() - 1 - int(lost))
        except RuntimeError:  # the process that hosts the store is gone
            first = self._first or own
        if lost:
            exception.add_note(f"{_PREFIX}the first error was that of {first}")
            _log.error("rank %d ends after %s", rank, first)

    def _tell(self, own: str, *, others: int) -> str:
        """Leave the error if it is the first, and wait until the others have read it.

        Returns:
            The first error.
        """
        store = _store()
        first: str = store.compare_set(self._key, "", own).decode()
        # `heard` counts the ranks that know the error, this one included; if the thread has read an
        # error (`_first`), it has counted this rank already.
        heard = store.add(f"{self._key}/heard", int(self._first is None))
        deadline = time.monotonic() + 10 * self.poll
        while first == own and heard <= others and time.monotonic() < deadline:
            time.sleep(self.poll / 10)
            heard = store.add(f"{self._key}/heard", 0)
        return first

    def _watch(self, store: Store, stop: threading.Event) -> None:
        """Wait for an error of another rank; end this process if it does not end by itself."""
        while not stop.wait(self.poll):
            try:
                if not store.check([self._key]):
                    continue
                self._first = store.get(self._key).decode()
                store.add(f"{self._key}/heard", 1)
            except RuntimeError as error:
                self._first = f"rank 0 or its launcher, which cannot be reached ({error})"
            if not stop.wait(self.grace):
                line = " ".join(f"{self._first}; waited {self.grace:g} s for this rank".split())
                # The main thread is stuck in a collective, which no exception can interrupt.
                print(f"ant-lightning: error: {_PREFIX}{line}", file=sys.stderr, flush=True)
                os._exit(1)
            return


def first_failure(error: BaseException) -> str | None:
    """The note about the first error among the ranks, if `error` only follows from it."""
    notes: list[str] = getattr(error, "__notes__", [])
    return next((note for note in notes if note.startswith(_PREFIX)), None)


def warn_of_shared_store() -> None:
    """Warn that ranks restarted by torchrun may read the addresses of dead ranks, and hang."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        rank_zero_warn(
            "torchrun --max-restarts: a restart may hang, as all of them share a store: start it "
            "with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment"
        )


def several_ranks() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _store() -> Store:
    """A separate connection to the store of the default process group."""
    return dist.distributed_c10d._get_default_store().clone()
