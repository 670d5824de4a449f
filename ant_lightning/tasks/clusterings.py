"""Clustering methods: each turns the log-SNR of a schedule into `TimestepClusters`."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ant_lightning.errors import ConfigError, check_above, check_whole
from ant_lightning.tasks.clusters import TimestepClusters
from ant_lightning.tasks.costs import snr_costs, timestep_costs
from ant_lightning.tasks.partition import partition

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Clustering(ABC):
    """Turns the log-SNR of a noise schedule into clusters of its timesteps.

    Subclasses implement `__call__`.

    Examples:
        >>> import torch
        >>> from ant_lightning import Clustering, TimestepClusters
        >>> class Halves(Clustering):
        ...     def __call__(self, log_snr):
        ...         return TimestepClusters((0, len(log_snr) // 2, len(log_snr)))
        >>> Halves()(torch.linspace(5, -5, 100)).boundaries
        (0, 50, 100)
    """

    weighted: bool = False
    _density: Tensor | None = None

    def with_density(self, density: Float[Tensor, " T"]) -> Clustering:
        """This clustering; with the costs weighted by the density, if it is `weighted`."""
        if not self.weighted:
            return self
        clustering = copy.copy(self)
        clustering._density = density
        return clustering

    def _weights(self) -> Tensor | None:
        """Weights of the costs.

        Raises:
            ConfigError: If the clustering is weighted and has no density.
        """
        if self.weighted and self._density is None:
            raise ConfigError("weighted: needs the density, by with_density(density), found none")
        return self._density if self.weighted else None

    @abstractmethod
    def __call__(self, log_snr: Float[Tensor, " T"]) -> TimestepClusters:
        """Cluster the `T` timesteps whose log-SNR is given.

        Raises:
            ConfigError: If the settings do not fit this `T`.
        """

    def measured_model(self) -> str | None:
        """Name of the model whose gradients determine the clusters; `None` if none does."""
        return None


class TimestepClustering(Clustering):
    """Clusters of equal size (up to one timestep), with the boundaries `floor(i T / k)`.

    They minimise the sum of `timestep_costs`. If `k` does not divide `T`, several partitions do;
    this one is that of the official code.

    Args:
        num_tasks: Number of clusters `k`.
        weighted: Whether timesteps count by how often training draws them; the paper's do not.

    Raises:
        ConfigError: If `num_tasks` is below 1.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 4, arXiv 2306.00354.

    Examples:
        >>> import torch
        >>> from ant_lightning import TimestepClustering
        >>> TimestepClustering(num_tasks=3)(torch.linspace(5, -5, 100)).boundaries
        (0, 33, 66, 100)
    """

    def __init__(self, num_tasks: int = 5, *, weighted: bool = False) -> None:
        check_whole(1, num_tasks=num_tasks)
        self.num_tasks = num_tasks
        self.weighted = weighted

    def __call__(self, log_snr: Float[Tensor, " T"]) -> TimestepClusters:
        """Cluster by timestep; only the length of `log_snr` matters.

        Raises:
            ConfigError: If there are fewer timesteps than clusters.
        """
        k, num_timesteps = self.num_tasks, len(log_snr)
        if k > num_timesteps:
            raise ConfigError(
                f"num_tasks: must be at most the number of timesteps {num_timesteps}, found {k}"
            )
        weights = self._weights()
        if weights is not None:
            return TimestepClusters(partition(timestep_costs(num_timesteps, weights=weights), k))
        return TimestepClusters(tuple(i * num_timesteps // k for i in range(k + 1)))


class SNRClustering(Clustering):
    """Clusters of similar noise levels: the partition with the smallest sum of `snr_costs`.

    Args:
        num_tasks: Number of clusters `k`.
        power: Power of the difference of log-SNRs: 1 as in the official code, 2 as in the paper.
        weighted: Whether timesteps count by how often training draws them; the paper's do not.

    Raises:
        ConfigError: If `num_tasks` is below 1 or `power` is not above 0.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 4, arXiv 2306.00354.

    Examples:
        >>> import torch
        >>> from ant_lightning import SNRClustering
        >>> SNRClustering(num_tasks=3)(torch.tensor([9.0, 8.9, 1.0, 0.9, 0.8, -5.0])).boundaries
        (0, 2, 5, 6)
    """

    def __init__(self, num_tasks: int = 5, power: float = 1, *, weighted: bool = False) -> None:
        check_whole(1, num_tasks=num_tasks)
        check_above(0, power=power)
        self.num_tasks = num_tasks
        self.power = power
        self.weighted = weighted

    def __call__(self, log_snr: Float[Tensor, " T"]) -> TimestepClusters:
        """Cluster by the differences of log-SNRs.

        Raises:
            ConfigError: If there are fewer timesteps than clusters.

        Warns:
            UserWarning: If no value is below 0, as in SNRs whose logarithm was not taken.
        """
        if bool((log_snr > 0).all()):
            warnings.warn(
                "log_snr: must be the natural logarithm of the SNR, which is below 0 where noise "
                f"prevails, found values from {float(log_snr.min()):.3g} to "
                f"{float(log_snr.max()):.3g}",
                stacklevel=2,
            )
        costs = snr_costs(log_snr, power=self.power, weights=self._weights())
        return TimestepClusters(partition(costs, self.num_tasks))


class FixedClustering(Clustering):
    """Clusters with given boundaries.

    Args:
        boundaries: `k + 1` increasing integers from 0 to `T`; cluster i is
            `[boundaries[i], boundaries[i + 1])`.

    Raises:
        ConfigError: If the boundaries are not increasing integers that start at 0.

    Examples:
        >>> import torch
        >>> from ant_lightning import FixedClustering
        >>> FixedClustering([0, 30, 100])(torch.linspace(5, -5, 100)).num_tasks
        2
    """

    def __init__(self, boundaries: Sequence[int]) -> None:
        self.clusters = TimestepClusters(tuple(boundaries))

    def __call__(self, log_snr: Float[Tensor, " T"]) -> TimestepClusters:
        """The given clusters.

        Raises:
            ConfigError: If the last boundary is not the length of `log_snr`.
        """
        if self.clusters.num_timesteps != len(log_snr):
            raise ConfigError(
                f"boundaries: must end at the number of timesteps {len(log_snr)}, "
                f"found {self.clusters.num_timesteps}"
            )
        return self.clusters
