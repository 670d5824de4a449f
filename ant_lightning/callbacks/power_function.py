"""Power-function averages of weights: their decay, and how other lengths are made from snapshots.

The average of length `s` after `n` updates gives the weights after update `t` the share
`p(t) = (g + 1) t^g / n^(g + 1)`. `s`, from 0 to 0.289, is the standard deviation of `t / n` under
`p`. All of it depends on ratios of counts only, so updates may stand for images.

Reference:
    Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
    arXiv 2312.02696, section 3 and appendix C.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Snapshot = tuple[int, float]  # updates made, and length


def check_length(name: str, length: float) -> None:
    """Refuse what is not the length of an average, under the name of the setting.

    Raises:
        ConfigError: If the length is not above 0 and below `1 / sqrt(12)`, a plain mean.
    """
    if not 0 < length < 12**-0.5:
        raise ConfigError(f"{name}: must be above 0 and below 0.289, found {length}")


@lru_cache
def exponent_of(length: float) -> float:
    """The exponent `g` of a length `s`: `s^2 = (g + 1) / ((g + 2)^2 (g + 3))`."""
    inverse = length**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())  # the one above -1


def length_of(exponent: float) -> float:
    """The length of an exponent; inverse of `exponent_of`."""
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


def power_decay(length: float, num_updates: float, delta: float = 1.0) -> float:
    """Share of the old average in the update that makes `num_updates`: `(1 - 1 / n)^(g + 1)`.

    It is 0 in the first update, so that the initial weights are forgotten.

    Args:
        length: Length of the average.
        num_updates: Updates with this one, or images.
        delta: Updates, or images, since the last update.
    """
    return float((1 - delta / num_updates) ** (exponent_of(length) + 1))


def profile_coefficients(
    snapshots: Sequence[Snapshot], num_updates: int, length: float
) -> tuple[NDArray[np.float64], float]:
    """The weights, of sum 1, with which snapshots give the average of another length.

    They solve the least squares `min_x || p - sum_i x_i p_i ||^2` over the profiles; then they are
    divided by their sum, as in the official code.

    Args:
        snapshots: Updates made at each snapshot, and its length.
        num_updates: Updates after which the average is wanted.
        length: Its length.

    Returns:
        The coefficients, and the norm of the profile's error relative to that of the profile.
    """
    updates = np.array([n for n, _ in snapshots], dtype=np.float64)
    exponents = np.array([exponent_of(s) for _, s in snapshots])
    target, exponent = np.float64(num_updates), np.float64(exponent_of(length))
    gram = _products(updates[:, None], exponents[:, None], updates[None], exponents[None])
    with_target = _products(updates, exponents, target, exponent)
    coefficients: NDArray[np.float64] = np.linalg.solve(gram, with_target).astype(np.float64)
    coefficients /= coefficients.sum()
    square = float(_products(target, exponent, target, exponent))
    error = coefficients @ gram @ coefficients - 2 * coefficients @ with_target + square
    return coefficients, math.sqrt(max(float(error), 0.0) / square)


def _products(
    n_a: NDArray[np.float64] | np.float64,
    g_a: NDArray[np.float64] | np.float64,
    n_b: NDArray[np.float64] | np.float64,
    g_b: NDArray[np.float64] | np.float64,
) -> NDArray[np.float64]:
    """`integral p_a(t) p_b(t) dt` over `[0, min(n_a, n_b)]`."""
    first = np.minimum(n_a, n_b)
    # The powers of ratios, at most 1, do not overflow.
    product: NDArray[np.float64] = (
        (g_a + 1) * (g_b + 1) / ((g_a + g_b + 1) * np.maximum(n_a, n_b))
    ) * ((first / n_a) ** g_a * (first / n_b) ** g_b)
    return product
