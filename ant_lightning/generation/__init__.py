"""Scores of generated images; here are the formulas alone."""

from ant_lightning.generation.frechet import (
    GaussianStatistics,
    RankDeficientWarning,
    frechet_distance,
)
from ant_lightning.generation.inception_score import MeanAndStd, inception_score
from ant_lightning.generation.kid import kernel_distance
from ant_lightning.generation.neighbours import (
    PrecisionRecall,
    nearest_distance,
    precision_recall,
)

__all__ = [
    "GaussianStatistics",
    "MeanAndStd",
    "PrecisionRecall",
    "RankDeficientWarning",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "nearest_distance",
    "precision_recall",
]
