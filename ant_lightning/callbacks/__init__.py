"""Callbacks that average, measure and draw."""

from ant_lightning.callbacks.conflict import ConflictMonitor
from ant_lightning.callbacks.ema import EMA, averaged_weights
from ant_lightning.callbacks.generation import GenerationMetrics
from ant_lightning.callbacks.progress import TrainingProgress
from ant_lightning.callbacks.samples import SampleGrid, SampleWriter

__all__ = [
    "EMA",
    "ConflictMonitor",
    "GenerationMetrics",
    "SampleGrid",
    "SampleWriter",
    "TrainingProgress",
    "averaged_weights",
]
