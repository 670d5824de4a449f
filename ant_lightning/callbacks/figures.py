"""Where a callback's figures go: TensorBoard, and PNG files beside its events."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from ant_lightning.callbacks.base import callback_of, steps_of
from ant_lightning.runtime.run_record import RunRecord

if TYPE_CHECKING:
    import lightning as L
    from matplotlib.figure import Figure

__all__ = ["log_folder", "save_figure"]


def save_figure(trainer: L.Trainer, figure: Figure, *, tag: str, explain: str) -> Path | None:
    """Write a figure to every TensorBoard logger and to `<log folder>/<tag>.png`, on rank 0.

    Args:
        trainer: Whose loggers and folder.
        figure: The figure.
        tag: Its name in TensorBoard, with `/` for groups.
        explain: One sentence that says how to read it, shown below it.

    Returns:
        The PNG file, or None on other ranks.
    """
    if not trainer.is_global_zero:
        return None
    figure.supxlabel(explain, fontsize=9.5, color="0.2")
    # An evaluation has no steps of its own: its figures belong to those of the checkpoint.
    step = steps_of(trainer, trainer.lightning_module)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(tag, figure, step, close=False)
    path = log_folder(trainer) / f"{tag.replace('/', '_')}.png"
    figure.savefig(path)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "pictures"):  # the page that shows what this run drew
            callback.pictures[tag] = path
    return path


def log_folder(trainer: L.Trainer) -> Path:
    """The run's folder, created if it does not exist; for rank 0.

    That of the `RunRecord` if the command line made one. Otherwise what `Trainer.log_dir` gives,
    which is a broadcast and hangs if one rank asks alone.
    """
    record = callback_of(trainer, RunRecord)
    folder: str | Path | None = trainer.default_root_dir
    if record is not None:
        folder = record.run_folder
    elif trainer.loggers:
        logger = trainer.loggers[0]
        with_versions = isinstance(logger, TensorBoardLogger | CSVLogger)
        folder = logger.log_dir if with_versions else logger.save_dir
    path = Path(folder or trainer.default_root_dir)
    path.mkdir(parents=True, exist_ok=True)
    return path
