"""Callbacks."""

from ant_lightning.callbacks.conflict import ConflictMonitor
from ant_lightning.callbacks.cost import StepCost
from ant_lightning.callbacks.dashboard import Dashboard
from ant_lightning.callbacks.ema import EMA, averaged_weights
from ant_lightning.callbacks.excess_risk import ExcessRisk
from ant_lightning.callbacks.image_figures import image_grid, sample_grid
from ant_lightning.callbacks.page_figure import stacked_page
from ant_lightning.callbacks.progress import TrainingProgress
from ant_lightning.callbacks.samples import SampleGrid, SampleWriter
from ant_lightning.callbacks.task_figures import cosine_heat_map, task_history, transfer_heat_map

__all__ = [
    "EMA",
    "ConflictMonitor",
    "Dashboard",
    "ExcessRisk",
    "SampleGrid",
    "SampleWriter",
    "StepCost",
    "TrainingProgress",
    "averaged_weights",
    "cosine_heat_map",
    "image_grid",
    "sample_grid",
    "stacked_page",
    "task_history",
    "transfer_heat_map",
]
