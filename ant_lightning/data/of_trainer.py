"""The data module of a trainer, if it is one of ours, which callbacks can ask for images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ant_lightning.data.module import ImageDataModule
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    import lightning as L

__all__ = ["image_data", "needed_image_data"]


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
            "ant_lightning.data.ImageDataModule, found "
            + ("loaders alone" if found is None else type(found).__name__)
        )
    return data
