"""Loading processes: which signals end them, and the error if one dies."""

from __future__ import annotations

import os
import re
import signal
import threading
from typing import Any

from ant_lightning.errors import DataLoadingError

# What torch's signal handler raises in the main thread, wherever that happens to be.
_DIED = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (?:is killed|exited)[^.]*")


def available_cores() -> int:
    """Cores that this process may use; torch warns of more loading processes than that."""
    if hasattr(os, "sched_getaffinity"):  # a scheduler may give fewer than the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worker_settings(num_workers: int) -> dict[str, Any]:
    """The arguments of a `DataLoader` that concern its processes.

    A scheduler such as SLURM sends its signal to all processes of a run. The run then finishes its
    step and saves a checkpoint, for which it may need another batch. Workers therefore ignore the
    scheduler's signal, and end only when the run's main process signals them.

    Workers are forked. A fork server, the default from Python 3.14 on, would be one more process:
    the scheduler's signal would end it, and its workers with it.
    """
    settings: dict[str, Any] = {"num_workers": num_workers}
    if num_workers and hasattr(signal, "sigwaitinfo"):  # not on macOS
        settings |= {"multiprocessing_context": "fork", "worker_init_fn": _end_with_the_run}
    return settings


def _end_with_the_run(worker: int) -> None:
    """Let SIGTERM and SIGUSR1 end this process only if the run's main process sends them."""
    # A blocked signal does not end the process. The thread below receives it, and who sent it.
    signals = {signal.SIGTERM, signal.SIGUSR1}
    run = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        while signal.sigwaitinfo(signals).si_pid != run:
            pass
        os._exit(0)  # sys.exit would end only this thread

    threading.Thread(target=wait, name="signals", daemon=True).start()


def dead_worker(error: BaseException) -> DataLoadingError | None:
    """The error to raise if `error` reports a dead loading process; else `None`."""
    found = _DIED.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    return DataLoadingError(
        f"data.num_workers: the processes that load data must live as long as the run, found "
        f"{' '.join(found.group().split())} (often for want of memory: use fewer)"
    )
