"""Affinity of timesteps: how well their gradients agree."""

from ant_lightning.affinity.curves import (
    BinnedAffinity,
    Correlation,
    affinity_by_distance,
    distance_correlation,
)
from ant_lightning.affinity.estimate import AffinityReliabilityWarning, task_affinity
from ant_lightning.affinity.estimators import (
    corrected_affinity,
    corrected_standard_error,
    plain_affinity,
)
from ant_lightning.affinity.grid import timestep_grid
from ant_lightning.affinity.halves import NonFiniteGradientError
from ant_lightning.affinity.reliability import split_half_reliability
from ant_lightning.affinity.result import AffinityResult
from ant_lightning.affinity.sketch import HadamardSketch

__all__ = [
    "AffinityReliabilityWarning",
    "AffinityResult",
    "BinnedAffinity",
    "Correlation",
    "HadamardSketch",
    "NonFiniteGradientError",
    "affinity_by_distance",
    "corrected_affinity",
    "corrected_standard_error",
    "distance_correlation",
    "plain_affinity",
    "split_half_reliability",
    "task_affinity",
    "timestep_grid",
]
