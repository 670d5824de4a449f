"""Where a callback's figures go: TensorBoard, and PNG files beside its events."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import TensorBoardLogger

if TYPE_CHECKING:
    import lightning as L
    from matplotlib.figure import Figure

__all__ = ["save_figure"]


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
    figure.supxlabel(explain, fontsize=8, color="0.35")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(tag, figure, trainer.global_step, close=False)
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    path = folder / f"{tag.replace('/', '_')}.png"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
