"""A placebo: tasks with the sizes of real clusters, but with randomly assigned timesteps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ant_lightning.errors import ConfigError
from ant_lightning.randomness import keyed_generator
from ant_lightning.tasks.clusterings import Clustering
from ant_lightning.tasks.clusters import TimestepClusters, _Table

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class ShuffledClusters(TimestepClusters):
    """Clusters of a permutation of the timesteps: task i has the timesteps `order[start_i:stop_i]`.

    `boundaries` refers to places in the permutation. `task_of` takes timesteps and `sample` returns
    timesteps, as for contiguous clusters.

    Attributes:
        order: A permutation of `0 .. T-1`.

    Raises:
        ConfigError: If `order` is not a permutation.
    """

    order: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if sorted(self.order) != list(range(self.num_timesteps)):
            raise ConfigError(
                f"order: must be a permutation of 0 .. {self.num_timesteps - 1}, "
                f"found {len(self.order)} numbers"
            )

    def task_of(self, timesteps: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Task of each timestep, same shape and device."""
        # Only for its checks: a negative timestep would be taken as an index from the end.
        super().task_of(timesteps)
        # The inverse permutation: the place of each timestep.
        places = torch.tensor(self.order, device=timesteps.device).argsort()
        return super().task_of(places[timesteps])

    def _made_table(self, density: Tensor) -> _Table:
        return super()._made_table(density[list(self.order)])

    def _cell_of(self, places: Tensor) -> Tensor:
        return torch.tensor(self.order, device=places.device)[places]


class ShuffledClustering(Clustering):
    """Tasks with the sizes of another clustering, and with randomly assigned timesteps.

    If a method is as good with these tasks as with the real clusters, its gain does not depend on
    which timesteps share a task.

    Args:
        clustering: Clustering that determines the sizes.
        seed: Seed of the permutation. It is part of the clustering, not the seed of the run.

    Examples:
        >>> import torch
        >>> from ant_lightning import ShuffledClustering, TimestepClustering
        >>> clusters = ShuffledClustering(TimestepClustering(2))(torch.linspace(5, -5, 6))
        >>> clusters.sizes.tolist(), sorted(clusters.order)
        ([3, 3], [0, 1, 2, 3, 4, 5])
    """

    def __init__(self, clustering: Clustering, *, seed: int = 0) -> None:
        self.clustering = clustering
        self.weighted = clustering.weighted
        self.seed = seed

    def with_density(self, density: Float[Tensor, " T"]) -> ShuffledClustering:
        """The same permutation of the other clustering with this density."""
        return ShuffledClustering(self.clustering.with_density(density), seed=self.seed)

    def __call__(self, log_snr: Float[Tensor, " T"]) -> ShuffledClusters:
        """Clusters with the other clustering's boundaries, over a permutation of the timesteps."""
        boundaries = self.clustering(log_snr).boundaries
        generator = keyed_generator(self.seed, "shuffled timesteps")
        order = torch.randperm(boundaries[-1], generator=generator)
        return ShuffledClusters(boundaries, tuple(order.tolist()))
