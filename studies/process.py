"""Commands of a study, each in a process that is forked with everything imported."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from importlib import import_module
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from studies.study import CLI_COMMANDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from multiprocessing.process import BaseProcess
    from pathlib import Path

__all__ = ["prepare_processes", "start_command"]

_CONTEXT = multiprocessing.get_context("forkserver")


def prepare_processes(commands: Iterable[Sequence[str]], *, threads: int) -> None:
    """Start the server that forks the processes. It imports the command line once.

    Without it, each fit of a minute would begin with 6 s of imports.

    Args:
        commands: The commands that will be run.
        threads: Threads of each process.
    """
    if any(command[0] in CLI_COMMANDS for command in commands):
        _CONTEXT.set_forkserver_preload(["ant_lightning.cli.parser"])
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(threads)))
    from multiprocessing.forkserver import ensure_running  # noqa: PLC0415 - absent on Windows

    ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def start_command(command: Sequence[str], *, log: Path, threads: int) -> BaseProcess:
    """Start a command; its exit code is that of the process, its output is added to `log`."""
    process = _CONTEXT.Process(target=_run, args=(tuple(command), str(log), threads))
    process.start()
    return process


def _run(command: Sequence[str], log: str, threads: int) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    print("$ " + " ".join(command), flush=True)
    if command[0] in CLI_COMMANDS:
        import torch  # noqa: PLC0415 - the other commands need not wait for it

        torch.set_num_threads(threads)
        code = import_module("ant_lightning.cli.main").main(list(command))
    else:
        code = import_module(command[0]).main(list(command[1:]))
    sys.stdout.flush()
    sys.exit(code or 0)


def _die_with_parent() -> None:
    """End with the parent: a leftover run must not write beside the one that replaces it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
