"""The files in a run's folder that say what the run was; without Lightning."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# Files that loggers write before the first step; a folder with no others holds no run.
_BEFORE_STEP_1 = ("events.out.tfevents*", "hparams.yaml", "class_map.json")
RUN_MARK = "loggers.json"  # written by runs that trained, and by no others


def newest_record(folder: Path) -> Path | None:
    """The newest `config` file of the run; if it never trained, that of an evaluation."""
    for name in ("config", "validate", "test", "predict"):
        newest, _ = numbered(folder, name)
        if newest is not None:
            return newest
    return None


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


def remove_empty_run(folder: Path) -> None:
    """Remove the folder of a run if it holds nothing but `_BEFORE_STEP_1`."""
    if not folder.is_dir():
        return
    inside = [path for path in folder.rglob("*") if path.is_file()]
    if all(any(path.match(pattern) for pattern in _BEFORE_STEP_1) for path in inside):
        shutil.rmtree(folder, ignore_errors=True)
