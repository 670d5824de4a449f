"""Affinity against distance: does it fall as timesteps, or their noise levels, grow apart?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from ant_lightning.errors import ConfigError, check_at_least, check_between
from ant_lightning.randomness import keyed_generator

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class BinnedAffinity(NamedTuple):
    """Mean affinity of the pairs in each bin of distance; empty bins are left out.

    Attributes:
        distance: Mean distance of the pairs, `[b]`, in the units of the positions.
        mean: Mean affinity, `[b]`.
        std: Standard deviation of the affinity over the pairs, `[b]`; 0 for one pair.
        num_pairs: Number of pairs, `[b]`.
    """

    distance: Float[Tensor, " b"]
    mean: Float[Tensor, " b"]
    std: Float[Tensor, " b"]
    num_pairs: Int[Tensor, " b"]


class Correlation(NamedTuple):
    """A correlation with its confidence interval.

    Attributes:
        estimate: Correlation over all pairs.
        low: Lower end of the interval.
        high: Upper end of the interval.
        confidence: Confidence of the interval, e.g. 0.95.
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

    Examples:
        >>> import torch
        >>> from ant_lightning import affinity_by_distance
        >>> affinity = torch.tensor([[1.0, 0.8, 0.1], [0.8, 1.0, 0.6], [0.1, 0.6, 1.0]])
        >>> binned = affinity_by_distance(affinity, torch.tensor([0, 1, 2]), num_bins=3)
        >>> [round(mean, 2) for mean in binned.mean.tolist()], binned.num_pairs.tolist()
        ([0.7, 0.1], [2, 1])
    """
    from scipy.stats import binned_statistic  # noqa: PLC0415 - its import takes half a second

    check_at_least(1, num_bins=num_bins)
    values, distances, _, _ = _pairs(affinity, positions)
    # By default scipy's bins begin at the smallest distance, not at 0.
    limits = {"bins": num_bins, "range": (0, float(distances.max()))}
    columns = [values.numpy(), distances.numpy()]  # both averaged over the pairs of a bin
    (mean, distance), _, _ = binned_statistic(distances, columns, "mean", **limits)
    std, _, _ = binned_statistic(distances, values, "std", **limits)
    count, _, _ = binned_statistic(distances, values, "count", **limits)
    filled = count > 0
    columns = [distance, mean, std, count.astype(int)]
    return BinnedAffinity(*(torch.from_numpy(column[filled]) for column in columns))


def distance_correlation(
    affinity: Float[Tensor, "n n"],
    positions: Float[Tensor, " n"],
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Correlation:
    """Spearman's rank correlation of affinity and `|position_i - position_j|`, pairs i < j.

    Pairs that share a timestep are not independent, so the bootstrap resamples timesteps, not
    pairs. The weight of a pair is the product of its two timesteps' counts in the resample. Ranks
    are computed once, over all pairs: ranking each resample anew hardly changes the interval. The
    interval covers the choice of timesteps. It does not cover other trainings, which need several
    seeds.

    Args:
        affinity: Plain or corrected; pairs with NaN are left out.
        positions: Timesteps, or their log-SNR.
        num_resamples: Bootstrap samples.
        confidence: Confidence of the percentile interval.
        seed: Seed of the bootstrap.

    Returns:
        The correlation; NaN if all affinities or all distances are equal.

    Raises:
        ConfigError: If shapes do not fit, no pair is finite, or a setting is out of its range.

    Examples:
        >>> import torch
        >>> from ant_lightning import distance_correlation
        >>> timesteps = torch.arange(5.0)
        >>> affinity = 1 / (1 + (timesteps[:, None] - timesteps).abs())  # falls with distance
        >>> round(distance_correlation(affinity, timesteps).estimate, 3)
        -1.0
    """
    from scipy.stats import rankdata  # noqa: PLC0415 - its import takes half a second

    check_at_least(1, num_resamples=num_resamples)
    check_between(0, 1, confidence=confidence)
    values, distances, rows, columns = _pairs(affinity, positions)
    x, y = (torch.from_numpy(rankdata(each)) for each in (values, distances))
    x, y = x - x.mean(), y - y.mean()
    estimate = (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()

    n = len(positions)
    generator = keyed_generator(seed, "affinity-bootstrap")
    drawn = torch.randint(n, (num_resamples, n), generator=generator)
    # `counts[b, i]`: how often resample b has timestep i.
    counts = torch.zeros(num_resamples, n, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))

    def sums(numbers: Tensor) -> Tensor:
        """Sum of a number over the pairs of each resample: `counts^T M counts`."""
        # M is 0 on the diagonal: a timestep drawn twice makes no pair with itself.
        matrix = torch.zeros(n, n, dtype=torch.float64)
        matrix[rows, columns] = numbers
        return ((counts @ matrix) * counts).sum(1)

    weight = sums(torch.ones_like(x))
    mean_x, mean_y = sums(x) / weight, sums(y) / weight
    variance_x, variance_y = sums(x * x) / weight - mean_x**2, sums(y * y) / weight - mean_y**2
    draws = (sums(x * y) / weight - mean_x * mean_y) / (variance_x * variance_y).sqrt()
    # A resample with few distinct timesteps may have equal distances only: 0 / 0, left out.
    draws = draws[draws.isfinite()]
    if not len(draws):
        return Correlation(float(estimate), math.nan, math.nan, confidence)
    tail = (1 - confidence) / 2
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
        raise ConfigError("affinity: must have at least one finite pair, found none")
    return values[finite], distances[finite], rows[finite], columns[finite]
