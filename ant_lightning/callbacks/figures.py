"""Where callbacks write: figures to TensorBoard and PNG files, rows to files of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from ant_lightning.callbacks.base import callback_of, steps_of
from ant_lightning.runtime.run_record import RunRecord

if TYPE_CHECKING:
    from collections.abc import Mapping

    import lightning as L
    from matplotlib.figure import Figure

__all__ = ["append_row", "log_folder", "save_figure"]


def save_figure(trainer: L.Trainer, figure: Figure, *, tag: str, explain: str) -> Path | None:
    """Write a figure to every TensorBoard logger and to `<log folder>/<tag>.png`, on rank 0.

    Args:
        trainer: Trainer with the loggers and the folder.
        figure: The figure.
        tag: Its name in TensorBoard, with `/` for groups.
        explain: One sentence that says how to read it, shown below it.

    Returns:
        The PNG file, or `None` on other ranks.
    """
    if not trainer.is_global_zero:
        return None
    figure.supxlabel(explain, fontsize=9.5, color="0.2")
    step = steps_of(trainer, trainer.lightning_module)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(tag, figure, step, close=False)
    path = log_folder(trainer) / f"{tag.replace('/', '_')}.png"
    figure.savefig(path)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # `Dashboard`, which imports this file: `isinstance` would need a circular import.
        if hasattr(callback, "pictures"):
            callback.pictures[tag] = path
    return path


def append_row(trainer: L.Trainer, name: str, row: Mapping[str, Any]) -> None:
    """Append a row to a file of JSON lines in the log folder, on rank 0."""
    if trainer.is_global_zero:
        with (log_folder(trainer) / name).open("a") as file:
            file.write(json.dumps(row) + "\n")


def log_folder(trainer: L.Trainer) -> Path:
    """The folder of the run, created if it does not exist; for rank 0.

    On the command line it is the folder of the `RunRecord`, from Python that of the first logger.
    `Trainer.log_dir` would not do: it broadcasts, and hangs if only one rank calls it.
    """
    record, logger = callback_of(trainer, RunRecord), trainer.logger
    folder: str | Path | None
    if record is not None:
        folder = record.run_folder
    elif isinstance(logger, TensorBoardLogger | CSVLogger):
        folder = logger.log_dir
    else:
        folder = logger.save_dir if logger is not None else None
    path = Path(folder or trainer.default_root_dir)
    path.mkdir(parents=True, exist_ok=True)
    return path
