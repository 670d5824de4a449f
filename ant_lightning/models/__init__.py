"""LightningModules."""

from ant_lightning.models.adm import ADMModule
from ant_lightning.models.autoencoder import AutoencoderModule
from ant_lightning.models.denoiser import DiffusionModule, Draws
from ant_lightning.models.dit import DiTModule
from ant_lightning.models.first_stage.first_stage import FirstStage
from ant_lightning.models.ldm import LDMModule
from ant_lightning.models.module import MultiTaskDiffusion

__all__ = [
    "ADMModule",
    "AutoencoderModule",
    "DiTModule",
    "DiffusionModule",
    "Draws",
    "FirstStage",
    "LDMModule",
    "MultiTaskDiffusion",
]
