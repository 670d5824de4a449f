"""What a trainer has of ours: a data module that can be asked for images, and a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ant_lightning.data.module import ImageDataModule
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    import lightning as L

__all__ = ["image_data", "needed_image_data", "run_folder"]


def image_data(trainer: L.Trainer) -> ImageDataModule | None:
    """The trainer's data module; None if it has only loaders, or a data module of another kind."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, ImageDataModule) else None


def needed_image_data(trainer: L.Trainer, who: str) -> ImageDataModule:
    """The trainer's data module, for a callback that needs one.

    Raises:
        ConfigError: If there is none of our kind; names the callback `who`.
    """
    data = image_data(trainer)
    if data is None:
        found = getattr(trainer, "datamodule", None)
        raise ConfigError(
            f"{who}: asks the data module for images, so the trainer needs an "
            "ant_lightning.ImageDataModule, found "
            + ("loaders alone" if found is None else type(found).__name__)
        )
    return data


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of this run; to be called on every rank.

    That of `RunRecord` on the command line, which belongs to one run. From Python it is that of the
    first logger (a broadcast), which several runs may share.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        folder = getattr(callback, "run_folder", None)
        if isinstance(folder, Path):
            return folder
    return Path(trainer.log_dir or trainer.default_root_dir)
