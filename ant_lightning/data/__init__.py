"""LightningDataModules."""

from ant_lightning.data.batch import Batch
from ant_lightning.data.digits import DigitsData
from ant_lightning.data.digits_mixture import DigitsMixtureData
from ant_lightning.data.image_folder import ImageFolderData
from ant_lightning.data.latents.cache import check_first_stage
from ant_lightning.data.latents.module import LatentsData
from ant_lightning.data.latents.space import LatentSpace
from ant_lightning.data.latents.writer import LatentWriter
from ant_lightning.data.loader import ImageDataset, ShuffledLoader
from ant_lightning.data.module import ImageDataModule, to_uint8
from ant_lightning.data.shapes import ShapesData

__all__ = [
    "Batch",
    "DigitsData",
    "DigitsMixtureData",
    "ImageDataModule",
    "ImageDataset",
    "ImageFolderData",
    "LatentSpace",
    "LatentWriter",
    "LatentsData",
    "ShapesData",
    "ShuffledLoader",
    "check_first_stage",
    "to_uint8",
]
