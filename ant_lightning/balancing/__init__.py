"""Balancers of task losses and task gradients, and the call that uses them; torch alone."""

from ant_lightning.balancing.auto import Auto
from ant_lightning.balancing.backward import BackwardReport, task_gradients
from ant_lightning.balancing.base import Balancer, GradientBalancer, LossBalancer, SampleBalancer
from ant_lightning.balancing.continuous_uncertainty import ContinuousUncertainty
from ant_lightning.balancing.engines import Engine, Loop
from ant_lightning.balancing.famo import FAMO
from ant_lightning.balancing.gls import GLS
from ant_lightning.balancing.gradients import DenseTaskGradients, TaskGradients
from ant_lightning.balancing.gradnorm import GradNorm
from ant_lightning.balancing.gradvac import GradVac, gradvac_weights
from ant_lightning.balancing.history import DWA, RLW
from ant_lightning.balancing.imtl import IMTLL
from ant_lightning.balancing.linear import LinearScalarization
from ant_lightning.balancing.nash import NashMTL, nash_weights
from ant_lightning.balancing.objective import ObjectiveBalancer
from ant_lightning.balancing.one_call import multitask_backward
from ant_lightning.balancing.one_pass import LowMemory, OnePass
from ant_lightning.balancing.pcgrad import PCGrad, pcgrad_weights
from ant_lightning.balancing.placed_gradients import PlacedTaskGradients
from ant_lightning.balancing.reduced_gradients import ReducedTaskGradients
from ant_lightning.balancing.reduction import GroupReduction, Reduction, default_reduction
from ant_lightning.balancing.sharded_gradients import ShardedTaskGradients
from ant_lightning.balancing.stch import STCH
from ant_lightning.balancing.step import MultiTaskStep
from ant_lightning.balancing.step_losses import StepLosses, Weights
from ant_lightning.balancing.torchjd import TorchJDBalancer
from ant_lightning.balancing.uncertainty import UncertaintyWeighting
from ant_lightning.errors import UnsupportedError

__all__ = [
    "DWA",
    "FAMO",
    "GLS",
    "IMTLL",
    "RLW",
    "STCH",
    "Auto",
    "BackwardReport",
    "Balancer",
    "ContinuousUncertainty",
    "DenseTaskGradients",
    "Engine",
    "GradNorm",
    "GradVac",
    "GradientBalancer",
    "GroupReduction",
    "LinearScalarization",
    "Loop",
    "LossBalancer",
    "LowMemory",
    "MultiTaskStep",
    "NashMTL",
    "ObjectiveBalancer",
    "OnePass",
    "PCGrad",
    "PlacedTaskGradients",
    "ReducedTaskGradients",
    "Reduction",
    "SampleBalancer",
    "ShardedTaskGradients",
    "StepLosses",
    "TaskGradients",
    "TorchJDBalancer",
    "UncertaintyWeighting",
    "UnsupportedError",
    "Weights",
    "default_reduction",
    "gradvac_weights",
    "multitask_backward",
    "nash_weights",
    "pcgrad_weights",
    "task_gradients",
]
