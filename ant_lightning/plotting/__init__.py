"""Figures from arrays: the pictures that callbacks log and that notebooks and docs show."""

from ant_lightning.plotting.affinity import NoiseAxis, affinity_curves, affinity_heat_maps
from ant_lightning.plotting.arrows import gradient_arrows
from ant_lightning.plotting.clusters import (
    boundaries_figure,
    clusterings_figure,
    importance_density,
)
from ant_lightning.plotting.gaps import transfer_gap_bars
from ant_lightning.plotting.images import image_grid, sample_grid
from ant_lightning.plotting.page import stacked_page
from ant_lightning.plotting.quality import quality_history
from ant_lightning.plotting.tasks import cosine_heat_map, task_history, transfer_heat_map

__all__ = [
    "NoiseAxis",
    "affinity_curves",
    "affinity_heat_maps",
    "boundaries_figure",
    "clusterings_figure",
    "cosine_heat_map",
    "gradient_arrows",
    "image_grid",
    "importance_density",
    "quality_history",
    "sample_grid",
    "stacked_page",
    "task_history",
    "transfer_gap_bars",
    "transfer_heat_map",
]
