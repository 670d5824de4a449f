"""Metrics of generated images by the field's definitions: FID, KID, IS, precision, recall."""

from ant_lightning.metrics.collect import collect_features, concatenate_features
from ant_lightning.metrics.digits_features import DigitsFeatures
from ant_lightning.metrics.features import FeatureExtractor, Features, ModuleFeatures
from ant_lightning.metrics.frechet import RankDeficientWarning, frechet_distance
from ant_lightning.metrics.generation import GenerationScores
from ant_lightning.metrics.image_files import image_batches
from ant_lightning.metrics.inception import InceptionFeatures
from ant_lightning.metrics.inception_score import MeanAndStd, inception_score
from ant_lightning.metrics.kid import kernel_distance
from ant_lightning.metrics.moments import FeatureMoments, GaussianStatistics
from ant_lightning.metrics.nearest import nearest_distance
from ant_lightning.metrics.precision_recall import (
    PrecisionRecall,
    manifold_membership,
    neighbour_radii,
    precision_recall,
)
from ant_lightning.metrics.reference import ReferenceStatistics, load_reference, save_reference
from ant_lightning.metrics.reference_cache import cached_reference, reference_fingerprint
from ant_lightning.metrics.shapes_features import ShapesFeatures

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
