"""A placebo: tasks of the same sizes as real clusters, of timesteps that have nothing in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from ant_lightning.errors import ConfigError
from ant_lightning.randomness import keyed_generator
from ant_lightning.tasks.clusterings import Clustering
from ant_lightning.tasks.clusters import TimestepClusters

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["ShuffledClustering", "ShuffledClusters"]


@dataclass(frozen=True)
class ShuffledClusters(TimestepClusters):
    """Clusters of a permutation of the timesteps: task i holds `order[start_i:stop_i]`.

    `boundaries` and `sizes` are those of places in the permutation; `task_of` and `sample` are of
    timesteps, as ever.

    Attributes:
        order: Each of `0 .. T-1` once.

    Raises:
        ConfigError: If it is not such a permutation.
    """

    order: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if sorted(self.order) != list(range(self.num_timesteps)):
            raise ConfigError(
                f"order: must be a permutation of 0 .. {self.num_timesteps - 1}, found "
                f"{len(self.order)} numbers"
            )

    def task_of(self, timesteps: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Task of each timestep, same shape and device; errors as for contiguous clusters."""
        super().task_of(timesteps)  # for its errors
        places = torch.tensor(self.order, device=timesteps.device).argsort()
        return super().task_of(places[timesteps])

    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        allocation: Literal["equal", "proportional"] = "equal",
    ) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """Draw `timesteps` and `task_ids` as contiguous clusters do, from the permutation."""
        places, tasks = super().sample(batch_size, generator=generator, allocation=allocation)
        return torch.tensor(self.order, device=places.device)[places], tasks


class ShuffledClustering(Clustering):
    """Takes the sizes of another clustering and deals the timesteps out at random.

    What a multi-task method gains over it is due to which timesteps share a task; what it gains
    with it is not.

    Args:
        clustering: Gives the sizes.
        seed: Of the permutation; part of the clustering, so not the seed of the run.
    """

    def __init__(self, clustering: Clustering, *, seed: int = 0) -> None:
        self.clustering = clustering
        self.seed = seed

    def __call__(self, log_snr: Float[Tensor, " T"]) -> ShuffledClusters:
        """Clusters with the boundaries of the other's, over a permutation of its timesteps."""
        boundaries = self.clustering(log_snr).boundaries
        generator = keyed_generator(self.seed, "shuffled timesteps")
        order = torch.randperm(boundaries[-1], generator=generator)
        return ShuffledClusters(boundaries, tuple(order.tolist()))
