"""Files that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside `path`, flush it to the disk, and only then give it its name.

    The folder is flushed as well: after a power cut it names the new file or the old one.

    Args:
        path: The file; its folder is made if missing.
        write: Called with the open binary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two ranks that share a folder out of each other's unfinished files.
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
