"""Writes files so that they are whole or absent, even if the process is killed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class _Figure(Protocol):
    """A figure of matplotlib."""

    def savefig(self, fname: BinaryIO, *, format: str) -> object:
        """Draw it into an open file."""


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


def write_text(path: Path, text: str) -> None:
    r"""Write text in UTF-8, with its line ends as they are, atomically.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ant_lightning.files.atomic import write_text
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(Path(folder) / "a" / "b.md", "# Title\n")
        ...     [path.name for path in (Path(folder) / "a").iterdir()]
        ['b.md']
    """
    write_atomically(path, lambda file: file.write(text.encode()))


def write_figure(path: Path, figure: _Figure) -> None:
    """Draw a figure of matplotlib in the format that the name ends with, atomically."""
    format = path.suffix.removeprefix(".")
    write_atomically(path, lambda file: figure.savefig(file, format=format))
