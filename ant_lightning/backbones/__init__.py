"""The networks DiT and UNet, their published sizes, and the loading of published checkpoints."""

from ant_lightning.backbones.checkpoint_layouts import CheckpointReport
from ant_lightning.backbones.dit import DiT
from ant_lightning.backbones.official_checkpoints import load_official_checkpoint
from ant_lightning.backbones.unet import UNet

__all__ = ["CheckpointReport", "DiT", "UNet", "load_official_checkpoint"]
