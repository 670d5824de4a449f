"""Processes that load data: the signals they leave to the run, and what is said when one dies."""

from __future__ import annotations

import os
import re
import signal
import threading
from typing import Any

from ant_lightning.errors import DataLoadingError

__all__ = ["dead_worker", "worker_settings"]

# A worker that is killed is noticed wherever the main thread happens to be.
_DIED = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (?:is killed|exited)[^.]*")


def worker_settings(num_workers: int) -> dict[str, Any]:
    """The arguments of a `DataLoader` that concern its processes.

    A scheduler that wants a run to stop tells all of its processes, as SLURM does. The run then
    finishes its step and saves, for which it may need another batch; so its workers go on until it
    ends them. They are forked: a fork server, the default from Python 3.14 on, would be one more
    process that the signal ends, and take the workers with it.
    """
    settings: dict[str, Any] = {"num_workers": num_workers}
    if num_workers and hasattr(signal, "sigwaitinfo"):  # not on macOS
        settings |= {"multiprocessing_context": "fork", "worker_init_fn": _obey_the_run_alone}
    return settings


def _obey_the_run_alone(worker: int) -> None:
    """SIGTERM and SIGUSR1 end this process only if the run sends them."""
    signals = {signal.SIGTERM, signal.SIGUSR1}
    run = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def obey() -> None:
        while signal.sigwaitinfo(signals).si_pid != run:
            pass
        os._exit(0)

    threading.Thread(target=obey, name="signals", daemon=True).start()


def dead_worker(error: BaseException) -> DataLoadingError | None:
    """What to say of the death of a loading process; None if `error` is something else."""
    found = _DIED.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    return DataLoadingError(
        f"data.num_workers: the processes that load data must live as long as the run, found "
        f"{' '.join(found.group().split())} (often for want of memory: use fewer)"
    )
