"""The files in a run's folder that say what the run was; without Lightning."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Files that loggers write before the first step; a folder with no others holds no run.
_BEFORE_STEP_1 = ("events.out.tfevents*", "hparams.yaml", "class_map.json")
RUN_OR_CHECKPOINT = "the folder of a run or a checkpoint"
RUN_MARK = "loggers.json"  # written by runs that trained, and by no others


def newest_record(folder: Path) -> Path | None:
    """The newest `config` file of the run; if it never trained, that of an evaluation."""
    for name in ("config", "validate", "diagnose", "test", "predict"):
        newest, _ = numbered(folder, name)
        if newest is not None:
            return newest
    return None


def no_run(path: str | Path, found: str, what: str = "the folder of a run") -> ConfigError:
    """The error for a path that is not `what`; names the runs in the folder, or else beside it.

    Args:
        path: The path that was given.
        found: What is there instead.
        what: What it must be.
    """
    path = Path(path)
    # Of a name that is misspelt, the runs beside it; the root and the working folder have too many.
    beside = found_runs(path.parent) if path.parent.name and not path.exists() else None
    near = f"; {path.parent} is {beside}" if beside else ""
    found = found_runs(path) or (found if path.exists() else "nothing")
    return ConfigError(f"{path}: must be {what}, found {found}{near}")


def found_runs(path: Path) -> str | None:
    """The runs in a folder, newest first, for messages; `None` without any."""
    runs = sorted(_runs_in(path), key=lambda run: (newest_record(run) or run).stat().st_mtime)
    names = [str(run.relative_to(path)) for run in runs[::-1]]
    others = ", ..." if names[5:] else ""
    shown = f"a folder of runs ({', '.join(names[:5])}{others}), such as "
    return f"{shown}{runs[-1]}" if runs else None


def has_checkpoint(folder: Path) -> bool:
    """Whether a run's folder, or that of its checkpoints, has one."""
    return any(any(folder.glob(each)) for each in ("*.ckpt", "checkpoints/*.ckpt"))


def _runs_in(folder: Path) -> Iterator[Path]:
    """The runs of a logger's name, in `<save_dir>/<name>`, or those of all names."""
    for pattern in ("*/", "*/*/"):
        runs = [p for p in folder.glob(pattern) if p.name != "checkpoints" and p.is_dir()]
        found = [run for run in runs if newest_record(run) or has_checkpoint(run)]
        if found:
            yield from found
            return


def numbered(folder: Path, name: str) -> tuple[Path | None, Path]:
    """The newest of `name.yaml`, `name_1.yaml`, ..., and the next name that is free."""
    newest, path, number = None, folder / f"{name}.yaml", 0
    while path.exists():
        number += 1
        newest, path = path, folder / f"{name}_{number}.yaml"
    return newest, path


def logger_versions(folder: Path) -> dict[str, str]:
    """The version of each logger class that the run in `folder` used."""
    try:
        found = json.loads((folder / RUN_MARK).read_text(encoding="utf8"))
    except (OSError, ValueError):  # an older run has none
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def new_folders(folder: Path) -> tuple[Path, ...]:
    """The folder of a new run and those above it, as far as they do not exist yet."""
    return tuple(takewhile(lambda each: not each.exists(), (folder, *folder.parents)))


def remove_empty_run(made: tuple[Path, ...]) -> None:
    """Remove folders that were made for a run, if it holds nothing but `_BEFORE_STEP_1`.

    Args:
        made: The `new_folders` of the run; those above it go if nothing else lies in them.
    """
    if not made or not made[0].is_dir():
        return
    folder, *above = made
    inside = [path for path in folder.rglob("*") if path.is_file()]
    if all(any(path.match(pattern) for pattern in _BEFORE_STEP_1) for path in inside):
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # one holds something, such as another run
            for each in above:
                each.rmdir()
