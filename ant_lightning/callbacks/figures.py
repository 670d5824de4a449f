"""Where callbacks write: figures to loggers and PNG files, rows to files of JSON lines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ant_lightning.callbacks.base import steps_of
from ant_lightning.files.atomic import write_figure
from ant_lightning.runtime.loggers import send_picture
from ant_lightning.runtime.run_record import local_run_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import lightning as L
    from matplotlib.figure import Figure


def save_figure(trainer: L.Trainer, figure: Figure, *, tag: str, explain: str) -> Path | None:
    """Write a figure to `<log folder>/<tag>.png` and to every logger that shows any, on rank 0.

    Args:
        trainer: Trainer with the loggers and the folder.
        figure: The figure.
        tag: Its name in the loggers, with `/` for groups.
        explain: One sentence that says how to read it, shown below it.

    Returns:
        The PNG file, or `None` on other ranks.
    """
    if not trainer.is_global_zero:
        return None
    figure.supxlabel(explain, fontsize=9.5, color="0.2")
    path = picture_file(trainer, tag)
    write_figure(path, figure)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    step = steps_of(trainer, trainer.lightning_module)
    send_picture(trainer.loggers, tag, pixels, step=step)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # `Dashboard`, which imports this file: `isinstance` would need a circular import.
        if hasattr(callback, "pictures"):
            callback.pictures[tag] = path
    return path


def picture_file(trainer: L.Trainer, tag: str) -> Path:
    """The PNG file of a figure in the log folder."""
    return log_folder(trainer) / f"{tag.replace('/', '_')}.png"


def append_row(trainer: L.Trainer, name: str, row: Mapping[str, Any]) -> None:
    """Append a row to a file of JSON lines in the log folder, on rank 0."""
    if trainer.is_global_zero:
        with (log_folder(trainer) / name).open("a") as file:
            file.write(json.dumps(row) + "\n")


def log_folder(trainer: L.Trainer) -> Path:
    """The folder of the run (`local_run_folder`), created if it does not exist; for rank 0."""
    path = local_run_folder(trainer)
    path.mkdir(parents=True, exist_ok=True)
    return path
