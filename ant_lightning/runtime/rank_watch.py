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

__all__ = ["RankWatch", "first_failure", "several_ranks", "warn_of_shared_store"]

_log = logging.getLogger(__name__)
_PREFIX = "ranks: "
# What gloo and NCCL say of a rank that is gone depends on how far the call had come.
_LOST = re.compile(
    r"gloo/|connection (?:closed|reset) by peer|remote worker|nccl(?:RemoteError|SystemError)",
    re.IGNORECASE,
)


class RankWatch(L.Callback):
    """Ends all ranks of a run within a bounded time of the first error of any of them.

    A rank that raises leaves its error in the store of the process group, and waits a moment for
    the others to read it. A rank that fails because another is gone raises with a note that quotes
    the first error. A rank that is stuck (NCCL does not notice that a rank is gone) ends its
    process `grace` seconds after it was told. A rank that was killed leaves no error: the others
    say that they lost one, or the launcher ends them. On one process it does nothing.

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
        """Start to watch."""
        self._stop.set()  # of a run before this one
        if not several_ranks():
            return
        warn_of_shared_store()
        # A key of its own for every run: torchrun's store may outlive the ranks it restarts.
        self._key = f"ant_lightning/failed/{trainer.strategy.broadcast(uuid4().hex)}"
        self._first, self._stop = None, threading.Event()
        threading.Thread(
            target=self._watch, args=(_store(), self._stop), name="rank-watch", daemon=True
        ).start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The run is over."""
        self._stop.set()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Tell the others, or say which rank failed first."""
        self._stop.set()
        # A signal is not the failure of one rank, and reaches all of them.
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
            first = self._tell(own, others=dist.get_world_size() - 1 - int(lost))
        except RuntimeError:  # the rank that keeps the store is gone, and its errors with it
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
        # The thread may have counted this rank already.
        heard = store.add(f"{self._key}/heard", int(self._first is None))
        deadline = time.monotonic() + 10 * self.poll
        while first == own and heard <= others and time.monotonic() < deadline:
            time.sleep(self.poll / 10)
            heard = store.add(f"{self._key}/heard", 0)
        return first

    def _watch(self, store: Store, stop: threading.Event) -> None:
        """Look for an error of another rank until the run is over."""
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
                print(f"ant-lightning: error: {_PREFIX}{line}", file=sys.stderr, flush=True)
                os._exit(1)
            return


def first_failure(error: BaseException) -> str | None:
    """The first error among the ranks, if `error` is only a consequence of it."""
    notes: list[str] = getattr(error, "__notes__", [])
    return next((note for note in notes if note.startswith(_PREFIX)), None)


def warn_of_shared_store() -> None:
    """Warn that restarted ranks may read the addresses of the ranks before them, and hang."""
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
