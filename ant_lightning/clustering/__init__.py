"""Timesteps grouped into tasks: costs of segments, their exact partition, clusters to draw from."""

from ant_lightning.clustering.affinity_file import spread_affinity
from ant_lightning.clustering.clusterings import (
    Clustering,
    FixedClustering,
    GradientClustering,
    SNRClustering,
    TimestepClustering,
)
from ant_lightning.clustering.clusters import TimestepClusters
from ant_lightning.clustering.costs import affinity_costs, snr_costs, timestep_costs
from ant_lightning.clustering.partition import partition
from ant_lightning.clustering.shuffled import ShuffledClustering, ShuffledClusters

__all__ = [
    "Clustering",
    "FixedClustering",
    "GradientClustering",
    "SNRClustering",
    "ShuffledClustering",
    "ShuffledClusters",
    "TimestepClustering",
    "TimestepClusters",
    "affinity_costs",
    "partition",
    "snr_costs",
    "spread_affinity",
    "timestep_costs",
]
