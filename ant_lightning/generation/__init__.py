"""Scores of generated images."""

from ant_lightning.generation.collect import collect_features, concatenate_features
from ant_lightning.generation.extractors.digits import DigitsFeatures
from ant_lightning.generation.extractors.features import FeatureExtractor, Features, ModuleFeatures
from ant_lightning.generation.extractors.inception import InceptionFeatures
from ant_lightning.generation.extractors.shapes import ShapesFeatures
from ant_lightning.generation.frechet import RankDeficientWarning, frechet_distance
from ant_lightning.generation.image_files import image_batches
from ant_lightning.generation.inception_score import MeanAndStd, inception_score
from ant_lightning.generation.kid import kernel_distance
from ant_lightning.generation.moments import FeatureMoments, GaussianStatistics
from ant_lightning.generation.nearest import nearest_distance
from ant_lightning.generation.precision_recall import (
    PrecisionRecall,
    manifold_membership,
    neighbour_radii,
    precision_recall,
)
from ant_lightning.generation.reference import ReferenceStatistics, load_reference, save_reference
from ant_lightning.generation.reference_cache import cached_reference, reference_fingerprint
from ant_lightning.generation.scores import GenerationScores

__all__ = [
    "DigitsFeatures",
    "FeatureExtractor",
    "FeatureMoments",
    "Features",
    "GaussianStatistics",
    "GenerationScores",
    "InceptionFeatures",
    "MeanAndStd",
    "ModuleFeatures",
    "PrecisionRecall",
    "RankDeficientWarning",
    "ReferenceStatistics",
    "ShapesFeatures",
    "cached_reference",
    "collect_features",
    "concatenate_features",
    "frechet_distance",
    "image_batches",
    "inception_score",
    "kernel_distance",
    "load_reference",
    "manifold_membership",
    "nearest_distance",
    "neighbour_radii",
    "precision_recall",
    "reference_fingerprint",
    "save_reference",
]
