"""Names that have moved."""

from ant_lightning.data.image_search import find_images

__all__ = ["find_images"]
