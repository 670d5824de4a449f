"""Differences of paired runs with intervals, and Holm's correction for many comparisons."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

from scipy import stats

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PairedDifference", "difference_text", "holm", "mean_and_spread", "paired_difference"]


class PairedDifference(NamedTuple):
    """Mean of paired differences, its interval `[low, high]`, and the two-sided p-value of 0."""

    mean: float
    low: float
    high: float
    p_value: float

    @property
    def detected(self) -> bool:
        """Whether the interval excludes 0."""
        return not self.low <= 0 <= self.high


def paired_difference(differences: Sequence[float], *, level: float = 0.95) -> PairedDifference:
    """Student's t-test of paired differences, with the interval `mean ± t s / sqrt(n)`.

    Args:
        differences: One for each pair, at least 2.
        level: Coverage of the interval.

    Raises:
        ConfigError: If there are fewer than 2 differences.
    """
    if len(differences) < 2:
        raise ConfigError(f"differences: must be at least 2, found {len(differences)}")
    mean = statistics.mean(differences)
    if statistics.stdev(differences) == 0:  # no spread to judge them by
        return PairedDifference(mean, mean, mean, float(mean == 0))
    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(level)
    return PairedDifference(mean, float(interval.low), float(interval.high), float(test.pvalue))


def difference_text(differences: Sequence[float], *, digits: int) -> str:
    """Mean and interval of paired differences as text; the difference alone of one seed."""
    if len(differences) < 2:
        return "".join(f"{each:+.{digits}f}, one seed" for each in differences)
    d = paired_difference(differences)
    text = f"{d.mean:+.{digits}f} [{d.low:+.{digits}f}, {d.high:+.{digits}f}]"
    return text if d.detected else f"{text}, no detectable difference"


def mean_and_spread(values: Sequence[float], *, digits: int) -> str:
    """Mean and standard deviation as text; empty without values."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: rejecting those below α keeps the chance of any false rejection below α.

    The i-th smallest of m (from 0) becomes `max_{j <= i} min(1, (m - j) p_j)`.

    Reference: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted
