"""LightningModules."""

from ant_lightning.modules.adm import ADMModule
from ant_lightning.modules.autoencoder import AutoencoderModule
from ant_lightning.modules.child_processes import take_state_along
from ant_lightning.modules.dit import DiTModule
from ant_lightning.modules.evaluation import DiffusionModule, Draws
from ant_lightning.modules.first_stage import FirstStage
from ant_lightning.modules.ldm import LDMModule
from ant_lightning.modules.multitask import MultiTaskDiffusion
from ant_lightning.modules.sharded_strategy import ShardedStrategy
from ant_lightning.modules.stored_images import StoredImages

__all__ = [
    "ADMModule",
    "AutoencoderModule",
    "DiTModule",
    "DiffusionModule",
    "Draws",
    "FirstStage",
    "LDMModule",
    "MultiTaskDiffusion",
    "ShardedStrategy",
    "StoredImages",
]

take_state_along()
