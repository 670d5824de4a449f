"""LightningDataModules."""

from ant_lightning.data.batch import Batch
from ant_lightning.data.digits import DigitsData
from ant_lightning.data.loader import ImageDataset, ShuffledLoader
from ant_lightning.data.module import ImageDataModule, to_uint8

__all__ = ["Batch", "DigitsData", "ImageDataModule", "ImageDataset", "ShuffledLoader", "to_uint8"]
