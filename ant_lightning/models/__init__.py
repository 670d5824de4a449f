"""LightningModules."""

from ant_lightning.models.autoencoder import AutoencoderModule
from ant_lightning.models.denoiser import DiffusionModule
from ant_lightning.models.draws import Draws
from ant_lightning.models.first_stage.first_stage import FirstStage
from ant_lightning.models.learning_rate import InverseSqrtLR
from ant_lightning.models.module import MultiTaskDiffusion
from ant_lightning.models.paper_modules import ADMModule, DiTModule, LDMModule
from ant_lightning.models.settings import Optimization, Sampling, Tasks, TimestepSampling
from ant_lightning.runtime.child_processes import return_child_states

__all__ = [
    "ADMModule",
    "AutoencoderModule",
    "DiTModule",
    "DiffusionModule",
    "Draws",
    "FirstStage",
    "InverseSqrtLR",
    "LDMModule",
    "MultiTaskDiffusion",
    "Optimization",
    "Sampling",
    "Tasks",
    "TimestepSampling",
]

return_child_states()
