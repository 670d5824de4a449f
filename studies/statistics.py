"""What paired runs say: differences with intervals, corrected for how many were looked at."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, NamedTuple

from scipy import stats

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PairedDifference", "holm", "paired_difference"]


class PairedDifference(NamedTuple):
    """Mean of paired differences, its interval `[low, high]`, and the two-sided p-value of 0."""

    mean: float
    low: float
    high: float
    p_value: float

    @property
    def detected(self) -> bool:
        """Whether the interval leaves 0 out."""
        return not self.low <= 0 <= self.high


def paired_difference(differences: Sequence[float], *, level: float = 0.95) -> PairedDifference:
    """Student's t interval `mean ± t s / sqrt(n)` of paired differences.

    Args:
        differences: One for each pair, at least 2.
        level: Coverage of the interval.

    Raises:
        ConfigError: If there are fewer than 2 differences.
    """
    n = len(differences)
    if n < 2:
        raise ConfigError(f"differences: an interval needs at least 2 pairs, found {n}")
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    # Differences that are all the same have no spread to be judged by.
    p_value = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    return PairedDifference(mean, mean - half, mean + half, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: rejecting those below α keeps the chance of any false one below α.

    The i-th smallest of m (from 0) becomes `max_{j <= i} min(1, (m - j) p_j)`.

    Reference: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted
