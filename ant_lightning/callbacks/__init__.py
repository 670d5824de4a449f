"""Callbacks that average, measure and draw."""

from ant_lightning.callbacks.affinity import TaskAffinity
from ant_lightning.callbacks.checkpoints import Checkpoints
from ant_lightning.callbacks.conflict import ConflictMonitor
from ant_lightning.callbacks.cost import StepCost
from ant_lightning.callbacks.ema import EMA, averaged_weights
from ant_lightning.callbacks.excess_risk import ExcessRisk
from ant_lightning.callbacks.generation import GenerationMetrics
from ant_lightning.callbacks.layout import Dashboard
from ant_lightning.callbacks.negative_transfer import NegativeTransferGap
from ant_lightning.callbacks.progress import TrainingProgress
from ant_lightning.callbacks.reclustering import Reclustering
from ant_lightning.callbacks.run_lines import RunLines
from ant_lightning.callbacks.samples import SampleGrid, SampleWriter
from ant_lightning.callbacks.transfer import TransferMatrix

__all__ = [
    "EMA",
    "Checkpoints",
    "ConflictMonitor",
    "Dashboard",
    "ExcessRisk",
    "GenerationMetrics",
    "NegativeTransferGap",
    "Reclustering",
    "RunLines",
    "SampleGrid",
    "SampleWriter",
    "StepCost",
    "TaskAffinity",
    "TrainingProgress",
    "TransferMatrix",
    "averaged_weights",
]
