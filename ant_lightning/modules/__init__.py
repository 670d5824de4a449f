"""LightningModules."""

from ant_lightning.modules.dit import DiTModule
from ant_lightning.modules.multitask import Draws, MultiTaskDiffusion

__all__ = ["DiTModule", "Draws", "MultiTaskDiffusion"]
