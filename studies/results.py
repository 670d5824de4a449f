"""Rows of a study: one line of JSON for each finished cell, only ever appended."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ant_lightning.errors import ConfigError
from ant_lightning.files.atomic import write_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from studies.study import Cell, Study

__all__ = [
    "append_row",
    "begin_with",
    "collected",
    "finished_rows",
    "only_user",
    "read_rows",
    "restore_files",
]


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row and wait until it is on the disk.

    If a killed process left an incomplete line, a new line is begun first; `read_rows` skips the
    incomplete one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        whole = True
        if file.tell():
            file.seek(-1, os.SEEK_END)
            whole = file.read(1) == b"\n"
        line = json.dumps(row) + "\n"
        file.write((line if whole else "\n" + line).encode())
        file.flush()
        os.fsync(file.fileno())


def begin_with(published: Path, path: Path) -> None:
    """Copy rows to where a study keeps its own, unless it has some."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(published, path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a file; none if there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # incomplete, because its process was killed: the cell is run again
    return rows


def finished_rows(study: Study, path: Path) -> dict[str, dict[str, Any]]:
    """The latest row of each cell of the study that was run with the settings it has now.

    Each row has `cell`, `axes` (level of each axis), `hash`, `commit`, `machine`, `finished` (Unix
    time), `seconds` (of each command) and `files`: for every collected file its content, of a
    `.jsonl` file the list of its lines, of one that is not JSON the text.
    """
    rows = {}
    for row in read_rows(path):
        cell = study.cells.get(row["cell"])
        if cell is not None and cell.hash == row["hash"]:
            rows[cell.name] = row
    return rows


def collected(cell: Cell, folder: Path) -> dict[str, Any]:
    """The content of the files that a finished cell collects.

    Raises:
        ConfigError: If one of them was not written.
    """
    files: dict[str, Any] = {}
    for name in cell.collect:
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"study: cell {cell.name} collects {name}, which was not written")
        if name.endswith(".jsonl"):
            files[name] = read_rows(path)
        elif name.endswith(".json"):
            files[name] = json.loads(path.read_text())
        else:
            files[name] = path.read_text()
    return files


def restore_files(row: dict[str, Any], folder: Path) -> None:
    """Write the files that a row keeps into its cell's folder, if the folder is gone.

    A study can then be resumed elsewhere from its `results.jsonl` alone, if the remaining cells
    need no other files of the finished ones.
    """
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for name, content in row["files"].items():
        path = folder / name
        if name.endswith(".jsonl"):
            write_text(path, "".join(json.dumps(line) + "\n" for line in content))
        else:
            write_text(path, json.dumps(content) if name.endswith(".json") else content)


@contextmanager
def only_user(folder: Path) -> Iterator[None]:
    """Lock a study's folder; the lock ends with the process, however it ends.

    Raises:
        ConfigError: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"study: must be run by one process at a time, found another at work in {folder}"
            ) from None
        yield
