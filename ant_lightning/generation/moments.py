"""Mean and covariance of features: from all of them at once, or added up over batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError

__all__ = ["FeatureMoments", "GaussianStatistics"]

_CHUNK_ROWS = 1024  # float64 copies stay at 16 MiB for 2048 features


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean ``[d]`` and covariance ``[d, d]`` (denominator n - 1) of features, both float64.

    Args:
        mean: The mean ``[d]``.
        covariance: The covariance ``[d, d]``.
        num_samples: How many samples n they come from; null where a file does not say.
    """

    mean: Tensor
    covariance: Tensor
    num_samples: int | None = None

    @classmethod
    def from_features(cls, features: Tensor) -> GaussianStatistics:
        """Moments of features ``[n, d]``, centred before they are multiplied.

        Raises:
            ConfigError: Fewer than two features.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ConfigError(
                f"features must have shape [n, d] with n >= 2, got {list(features.shape)}"
            )
        total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
        for rows in features.split(_CHUNK_ROWS):
            total += rows.sum(0, dtype=torch.float64)
        mean = total / len(features)
        scatter = mean.new_zeros(len(mean), len(mean))
        for rows in features.split(_CHUNK_ROWS):
            centred = rows.double().sub_(mean) if rows.dtype != torch.float64 else rows - mean
            scatter.addmm_(centred.T, centred)
        return cls(mean, scatter.div_(len(features) - 1), len(features))


class FeatureMoments:
    """Sums over features that ranks and batches add up: count, sum ``[d]``, outer products.

    Use it where the features are too many to keep. All three are plain float64 sums, so
    all-reducing ``count``, ``total`` and ``outer`` gives the state of all ranks together.

    Args:
        num_features: The dimension d.
        device: Where the sums lie.
    """

    def __init__(self, num_features: int, *, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.total = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add features ``[n, d]``.

        Raises:
            ConfigError: Another dimension than d.
        """
        if features.ndim != 2 or features.shape[1] != len(self.total):
            raise ConfigError(
                f"features must have shape [n, {len(self.total)}], got {list(features.shape)}"
            )
        for rows in features.to(self.total.device).split(_CHUNK_ROWS):
            exact = rows.double()
            self.count += len(rows)
            self.total += exact.sum(0)
            self.outer.addmm_(exact.T, exact)

    def __add__(self, other: FeatureMoments) -> FeatureMoments:
        if self.total.shape != other.total.shape:
            raise ConfigError(
                f"moments must have one dimension, got {len(self.total)} and {len(other.total)}"
            )
        merged = FeatureMoments(len(self.total), device=self.total.device)
        merged.count = self.count + other.count
        merged.total = self.total + other.total
        merged.outer = self.outer + other.outer
        return merged

    def statistics(self) -> GaussianStatistics:
        """Mean and covariance of everything added.

        Raises:
            ConfigError: Fewer than two features were added.
        """
        count = int(self.count)
        if count < 2:
            raise ConfigError(f"num_samples must be at least 2 for a covariance, got {count}")
        mean = self.total / count
        covariance = (self.outer - count * torch.outer(mean, mean)) / (count - 1)
        return GaussianStatistics(mean, covariance, count)
