"""Affinity against distance: does it fall as timesteps, or their noise levels, grow apart?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from ant_lightning.errors import ConfigError
from ant_lightning.randomness import keyed_generator

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["BinnedAffinity", "Correlation", "affinity_by_distance", "distance_correlation"]


class BinnedAffinity(NamedTuple):
    """Mean affinity of the pairs in each bin of distance; bins without a pair are left out.

    Attributes:
        distance: Mean distance of the pairs, `[b]`, in the units of the positions.
        mean: Mean affinity, `[b]`.
        std: Standard deviation of the affinity of single pairs, `[b]`, 0 for one pair.
        num_pairs: `[b]`.
    """

    distance: Float[Tensor, " b"]
    mean: Float[Tensor, " b"]
    std: Float[Tensor, " b"]
    num_pairs: Int[Tensor, " b"]


class Correlation(NamedTuple):
    """A correlation with its interval.

    Attributes:
        estimate: Of all pairs.
        low: Lower end.
        high: Upper end.
        confidence: That the interval claims, e.g. 0.95.
    """

    estimate: float
    low: float
    high: float
    confidence: float


def affinity_by_distance(
    affinity: Float[Tensor, "n n"], positions: Float[Tensor, " n"], *, num_bins: int = 20
) -> BinnedAffinity:
    """Mean affinity against `|position_i - position_j|`, over the pairs i < j.

    Args:
        affinity: Plain or corrected; pairs with NaN are left out.
        positions: Timesteps, or their log-SNR.
        num_bins: Bins of equal width from 0 to the largest distance.

    Raises:
        ConfigError: If shapes do not fit, no pair is finite, or `num_bins` is below 1.
    """
    if num_bins < 1:
        raise ConfigError(f"num_bins: must be at least 1, found {num_bins}")
    values, distances, _, _ = _pairs(affinity, positions)
    width = max(float(distances.max()), torch.finfo(torch.float64).tiny) / num_bins
    bins = (distances / width).long().clamp(max=num_bins - 1)
    counts = torch.bincount(bins, minlength=num_bins)
    filled = counts > 0
    sizes = counts[filled]

    def mean_of(numbers: Tensor) -> Tensor:
        return torch.bincount(bins, numbers, minlength=num_bins)[filled] / sizes

    mean = mean_of(values)
    spread = torch.zeros(num_bins, dtype=torch.float64)
    spread[filled] = mean
    variance = mean_of((values - spread[bins]).square())
    return BinnedAffinity(mean_of(distances), mean, variance.sqrt(), sizes)


def distance_correlation(
    affinity: Float[Tensor, "n n"],
    positions: Float[Tensor, " n"],
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Correlation:
    """Spearman's rank correlation of affinity with `|position_i - position_j|`, pairs i < j.

    The pairs of a timestep are not independent, so the bootstrap draws timesteps, not pairs: a
    pair counts as often as the product of its two timesteps' counts, with the ranks of the whole
    (drawing ranks anew hardly changes it and would sort every time). The interval says how much
    hangs on the grid's timesteps; it does not hold other trainings, which need other seeds.

    Args:
        affinity: Plain or corrected; pairs with NaN are left out.
        positions: Timesteps, or their log-SNR.
        num_resamples: Bootstrap samples.
        confidence: Of the interval between percentiles.
        seed: Of the bootstrap.

    Returns:
        The correlation; NaN if all affinities or all distances are equal.

    Raises:
        ConfigError: If shapes do not fit, no pair is finite, or a setting is out of its range.
    """
    if num_resamples < 1 or not 0 < confidence < 1:
        found = f"{num_resamples} and {confidence}"
        raise ConfigError(f"num_resamples, confidence: must be >= 1 and in (0, 1), found {found}")
    values, distances, rows, columns = _pairs(affinity, positions)
    n = len(positions)
    x, y = _ranks(values), _ranks(distances)
    x, y = x - x.mean(), y - y.mean()
    generator = keyed_generator(seed, "affinity-bootstrap")
    drawn = torch.randint(n, (num_resamples, n), generator=generator)
    counts = torch.zeros(num_resamples, n, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))

    def sums(numbers: Tensor) -> Tensor:
        """Sums over pairs with the weights of every resample, as quadratic forms."""
        matrix = torch.zeros(n, n, dtype=torch.float64)
        matrix[rows, columns] = numbers
        return ((counts @ matrix) * counts).sum(1)

    weight = sums(torch.ones_like(x))
    mean_x, mean_y = sums(x) / weight, sums(y) / weight
    spread_x, spread_y = sums(x * x) / weight - mean_x**2, sums(y * y) / weight - mean_y**2
    draws = (sums(x * y) / weight - mean_x * mean_y) / (spread_x * spread_y).sqrt()
    estimate = (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()
    tail = (1 - confidence) / 2
    # A resample of few timesteps may leave no two distances apart: it says nothing.
    draws = draws[draws.isfinite()]
    if not len(draws):
        return Correlation(float(estimate), math.nan, math.nan, confidence)
    ends = draws.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Correlation(float(estimate), float(ends[0]), float(ends[1]), confidence)


def _pairs(affinity: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Affinity, distance and the two indices of each finite pair i < j."""
    n = len(positions)
    if positions.ndim != 1 or affinity.shape != (n, n):
        raise ConfigError(
            "affinity: must have a row and a column for each position, found shapes "
            f"{tuple(affinity.shape)} and {tuple(positions.shape)}"
        )
    rows, columns = torch.triu_indices(n, n, offset=1)
    values = affinity[rows, columns].double()
    distances = (positions[rows].double() - positions[columns].double()).abs()
    finite = values.isfinite() & distances.isfinite()
    if not bool(finite.any()):
        raise ConfigError("affinity: at least one pair must be finite, found none")
    return values[finite], distances[finite], rows[finite], columns[finite]


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts + 1) / 2.0
    return ranks[group].double()
