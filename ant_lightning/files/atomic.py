"""Writes files so that they are whole or absent, even if the process is killed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    The folder is flushed as well, so that after a power cut `path` is the new file or the old one.

    Args:
        path: The file; its folder is created if missing.
        write: Called with the open binary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id, so that two ranks that share a folder do not write to one temporary file.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
