"""Task affinity: how well the gradients at different timesteps agree."""

from ant_lightning.affinity.clustering import GradientClustering, spread_affinity
from ant_lightning.affinity.distance import affinity_by_distance, distance_correlation
from ant_lightning.affinity.estimate import (
    corrected_affinity,
    corrected_standard_error,
    plain_affinity,
    split_half_reliability,
)
from ant_lightning.affinity.gradient import NonFiniteGradientError
from ant_lightning.affinity.measure import (
    AffinityReliabilityWarning,
    task_affinity,
    timestep_grid,
)
from ant_lightning.affinity.result import AffinityResult

__all__ = [
    "AffinityReliabilityWarning",
    "AffinityResult",
    "GradientClustering",
    "NonFiniteGradientError",
    "affinity_by_distance",
    "corrected_affinity",
    "corrected_standard_error",
    "distance_correlation",
    "plain_affinity",
    "split_half_reliability",
    "spread_affinity",
    "task_affinity",
    "timestep_grid",
]
