"""Tasks: clusters of timesteps, and the methods that find them."""

from ant_lightning.tasks.clusterings import (
    Clustering,
    FixedClustering,
    SNRClustering,
    TimestepClustering,
)
from ant_lightning.tasks.clusters import TimestepClusters
from ant_lightning.tasks.costs import affinity_costs, snr_costs, timestep_costs
from ant_lightning.tasks.partition import partition
from ant_lightning.tasks.shuffled import ShuffledClustering, ShuffledClusters

__all__ = [
    "Clustering",
    "FixedClustering",
    "SNRClustering",
    "ShuffledClustering",
    "ShuffledClusters",
    "TimestepClustering",
    "TimestepClusters",
    "affinity_costs",
    "partition",
    "snr_costs",
    "timestep_costs",
]
