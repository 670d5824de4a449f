"""Ways to cluster timesteps: settings that a log-SNR turns into `TimestepClusters`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ant_lightning.errors import ConfigError
from ant_lightning.tasks.affinity_file import measured_model, read_affinity
from ant_lightning.tasks.clusters import TimestepClusters
from ant_lightning.tasks.costs import affinity_costs, snr_costs
from ant_lightning.tasks.partition import partition

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "Clustering",
    "FixedClustering",
    "GradientClustering",
    "SNRClustering",
    "TimestepClustering",
]


class Clustering(ABC):
    """Turns the log-SNR of a noise schedule into clusters of its timesteps."""

    @abstractmethod
    def __call__(self, log_snr: Float[Tensor, " T"]) -> TimestepClusters:
        """Cluster the `T` timesteps whose log-SNR is given.

        Raises:
            ConfigError: If the settings do not fit this `T`.
        """


class TimestepClustering(Clustering):
    """Clusters of equal size (up to one timestep), with the boundaries `floor(i T / k)`.

    These are one of the optima of `timestep_costs`. If k does not divide T there are several; this
    is the one that the official uniform clusters use.

    Args:
        num_tasks: Number of clusters `k`.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 4, arXiv 2306.00354.
    """

    def __init__(self, num_tasks: int = 5) -> None:
        self.num_tasks = _at_least_one(num_tasks)

    def __call__(self, log_snr: Float[Tensor, " T"]) -> TimestepClusters:
        """Cluster by the distance of timesteps; only the length of `log_snr` matters.

        Raises:
            ConfigError: If there are fewer timesteps than clusters.
        """
        k, num_timesteps = self.num_tasks, len(log_snr)
        if k > num_timesteps:
            raise ConfigError(
                f"num_tasks: {k} clusters need as many timesteps, found {num_timesteps}"
            )
        return TimestepClusters(tuple(i * num_timesteps // k for i in range(k + 1)))


class SNRClustering(Clustering):
    """Clusters of similar noise: the optimum of `snr_costs`.

    Args:
        num_tasks: Number of clusters.
        power: Power of the distance of log-SNRs: 1 as in the official code, 2 as in the paper.
    """

    def __init__(self, num_tasks: int = 5, power: float = 1) -> None:
        if power <= 0:
            raise ConfigError(f"power: must be above 0, found {power}")
        self.num_tasks = _at_least_one(num_tasks)
        self.power = power

    def __call__(self, log_snr: Float[Tensor, " T"]) -> TimestepClusters:
        """Cluster by the distance of log-SNRs."""
        return TimestepClusters(partition(snr_costs(log_snr, power=self.power), self.num_tasks))


class GradientClustering(Clustering):
    """Clusters of similar gradients: the optimum of `affinity_costs`.

    An affinity measured on a grid of timesteps is spread to all of them by nearest neighbour: see
    `read_affinity`.

    Args:
        affinity: Task affinity scores `[T, T]`, or the path of an `.npz` file with the arrays
            `affinity [n, n]`, `timesteps [n]` (increasing) and `num_timesteps`.
        num_tasks: Number of clusters.
    """

    def __init__(self, affinity: str | Path | Tensor, num_tasks: int = 5) -> None:
        self.affinity = affinity
        self.num_tasks = _at_least_one(num_tasks)

    def __call__(self, log_snr: Float[Tensor, " T"]) -> TimestepClusters:
        """Cluster by affinity; `log_snr` is compared with that of the file, if it has one.

        Raises:
            ConfigError: If there is no such file, or its affinity is not one of `T` timesteps or
                was measured with another schedule.
        """
        affinity = self.affinity
        if not isinstance(affinity, Tensor):
            affinity = read_affinity(Path(affinity), log_snr=log_snr)
        if len(affinity) != len(log_snr):
            raise ConfigError(
                f"affinity: must be of the schedule's {len(log_snr)} timesteps, "
                f"found {len(affinity)}"
            )
        return TimestepClusters(partition(affinity_costs(affinity), self.num_tasks))

    def measured_model(self) -> str:
        """What the affinity was measured of, as its file says; empty if nobody knows."""
        return "" if isinstance(self.affinity, Tensor) else measured_model(Path(self.affinity))


class FixedClustering(Clustering):
    """Clusters that are given.

    Args:
        boundaries: `k + 1` increasing integers from 0 to `T`; cluster i is
            `[boundaries[i], boundaries[i + 1])`.
    """

    def __init__(self, boundaries: Sequence[int]) -> None:
        self.clusters = TimestepClusters(tuple(boundaries))

    def __call__(self, log_snr: Float[Tensor, " T"]) -> TimestepClusters:
        """The given clusters, if they end at the length of `log_snr`."""
        if self.clusters.num_timesteps != len(log_snr):
            raise ConfigError(
                f"boundaries: the last must be the number of timesteps {len(log_snr)}, "
                f"found {self.clusters.num_timesteps}"
            )
        return self.clusters


def _at_least_one(num_tasks: int) -> int:
    """`num_tasks`, checked."""
    if num_tasks < 1:
        raise ConfigError(f"num_tasks: must be at least 1, found {num_tasks}")
    return num_tasks
