"""What a trained diffusion model says about its tasks: affinity, transfer, curves of both."""

from ant_lightning.analysis.affinity import AffinityReliabilityWarning, task_affinity
from ant_lightning.analysis.curves import (
    BinnedAffinity,
    Correlation,
    affinity_by_distance,
    distance_correlation,
)
from ant_lightning.analysis.estimators import (
    corrected_affinity,
    corrected_standard_error,
    plain_affinity,
)
from ant_lightning.analysis.grid import timestep_grid
from ant_lightning.analysis.halves import NonFiniteGradientError
from ant_lightning.analysis.negative_transfer import GapEstimate, negative_transfer_gap
from ant_lightning.analysis.reliability import split_half_reliability
from ant_lightning.analysis.result import AffinityResult
from ant_lightning.analysis.sketch import HadamardSketch
from ant_lightning.analysis.transfer import transfer_matrix
from ant_lightning.analysis.transfer_result import IntervalGap, TransferGapResult

__all__ = [
    "AffinityReliabilityWarning",
    "AffinityResult",
    "BinnedAffinity",
    "Correlation",
    "GapEstimate",
    "HadamardSketch",
    "IntervalGap",
    "NonFiniteGradientError",
    "TransferGapResult",
    "affinity_by_distance",
    "corrected_affinity",
    "corrected_standard_error",
    "distance_correlation",
    "negative_transfer_gap",
    "plain_affinity",
    "split_half_reliability",
    "task_affinity",
    "timestep_grid",
    "transfer_matrix",
]
