"""Names that have moved."""

from ant_lightning.data.module import image_data, needed_image_data
from ant_lightning.runtime.run_record import run_folder

__all__ = ["image_data", "needed_image_data", "run_folder"]
