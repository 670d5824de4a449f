"""Costs of segments of timesteps, the input of `partition`.

Each function returns `costs [T, T]`, float64 on the CPU. Entry `[l, r]` with `l <= r` is the cost
of the segment `l .. r`, both ends included, with the centre `c = (l + r + 1) // 2`. Entries with
`l > r` are infinite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ant_lightning.errors import ConfigError, check_above, check_at_least

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

    Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def timestep_costs(
    num_timesteps: int, *, weights: Float[Tensor, " T"] | None = None
) -> Float[Tensor, "T T"]:
    """Distance in timesteps: `costs[l, r] = sum_{t=l..r} w_t (t - c)²`, `w = 1` by default.

    The cost depends only on the length `n = r - l + 1`: it is `n (n² - 1) / 12` for odd n and
    `n (n² + 2) / 12` for even n. These are whole numbers, so the costs are exact.

    Args:
        num_timesteps: T.
        weights: `w`, the density of the timesteps for instance; its mean is made 1.

    Raises:
        ConfigError: If `num_timesteps` is below 1, or the weights do not fit.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 4, arXiv 2306.00354.

    Examples:
        >>> from ant_lightning import timestep_costs
        >>> timestep_costs(4)[0].tolist()
        [0.0, 1.0, 2.0, 6.0]
    """
    check_at_least(1, num_timesteps=num_timesteps)
    if weights is not None:
        factors = _factors(weights, num_timesteps)
        places = np.arange(num_timesteps, dtype=np.float64)
        return _sums_from_centre(lambda c: factors * (places - c) ** 2, num_timesteps)
    n = np.arange(1, num_timesteps + 1)
    by_length = n * (n * n + np.where(n % 2, -1, 2)) // 12
    # Row l is a window of `inf .. inf, cost(1) .. cost(T)` with l times inf in front. The window of
    # row 0 is the last one, hence the reversal.
    padded = np.concatenate([np.full(num_timesteps - 1, np.inf), by_length])
    windows = np.lib.stride_tricks.sliding_window_view(padded, num_timesteps)
    return torch.from_numpy(windows[::-1].copy())


def snr_costs(
    log_snr: Float[Tensor, " T"], *, power: float = 1, weights: Float[Tensor, " T"] | None = None
) -> Float[Tensor, "T T"]:
    """Difference in log-SNR: `costs[l, r] = sum_{t=l..r} w_t |log_snr[t] - log_snr[c]|^power`.

    Args:
        log_snr: Log signal-to-noise ratio of each timestep, `[T]`, finite, in any order.
        power: 1 as in the official code, 2 as in the paper.
        weights: `w`, 1 by default as in both; or the density of the timesteps, whose mean is made
            1.

    Raises:
        ConfigError: If `log_snr` is not one finite vector, `power` is not above 0, or the weights
            do not fit.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 4, arXiv 2306.00354.
        The official code rounds the centre `(l + r) / 2` half to even; here half is rounded up.

    Examples:
        >>> import torch
        >>> from ant_lightning import snr_costs
        >>> snr_costs(torch.tensor([9.0, 6.0, 0.0]))[0].tolist()
        [0.0, 3.0, 9.0]
    """
    check_above(0, power=power)
    values = _as_array(log_snr)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ConfigError(
            f"log_snr: must be one vector of finite numbers, found shape {values.shape} with "
            f"{int((~np.isfinite(values)).sum())} numbers that are not finite"
        )

    def distances(c: int) -> Array:
        """`|log_snr[t] - log_snr[c]|^power` for each timestep t."""
        away: Array = np.abs(values - values[c])
        if power != 1:
            away **= power
        return away if factors is None else factors * away

    factors = None if weights is None else _factors(weights, len(values))
    return _sums_from_centre(distances, len(values))


def affinity_costs(
    affinity: Float[Tensor, "T T"], *, weights: Float[Tensor, " T"] | None = None
) -> Float[Tensor, "T T"]:
    """Minus the affinity with the centre: `costs[l, r] = -sum_{t=l..r} w_t affinity[c, t]`.

    Args:
        affinity: Task affinity scores of all pairs of timesteps, `[T, T]`, finite.
        weights: `w`, 1 by default as in the paper; or the density of the timesteps, whose mean is
            made 1.

    Raises:
        ConfigError: If `affinity` is not one finite square matrix, or the weights do not fit.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 4, arXiv 2306.00354.
        In the official code a single timestep costs -1; here minus its affinity with itself.

    Examples:
        >>> import torch
        >>> from ant_lightning import affinity_costs
        >>> affinity = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 1.0]])
        >>> [round(cost, 2) for cost in affinity_costs(affinity)[0].tolist()]
        [-1.0, -1.5, -1.7]
    """
    values = _as_array(affinity)
    square = values.ndim == 2 and values.shape[0] == values.shape[1] and values.size
    if not square or not np.isfinite(values).all():
        raise ConfigError(
            f"affinity: must be a square matrix of finite numbers, found shape {values.shape} "
            f"with {int((~np.isfinite(values)).sum())} numbers that are not finite"
        )
    if weights is None:
        return _sums_from_centre(lambda c: -values[c], len(values))
    factors = _factors(weights, len(values))
    return _sums_from_centre(lambda c: -factors * values[c], len(values))


def _factors(weights: Tensor, num_timesteps: int) -> Array:
    """Weights with the mean 1.

    Raises:
        ConfigError: If there is not one for each timestep, or one is negative or not finite.
    """
    values = _as_array(weights)
    if values.shape != (num_timesteps,) or not ((values >= 0) & (values < np.inf)).all():
        raise ConfigError(
            f"weights: must be {num_timesteps} finite numbers of at least 0, found shape "
            f"{values.shape} with a smallest of {values.min()}"
        )
    factors: Array = values / values.mean()
    return factors


def _as_array(values: Tensor) -> Array:
    """`values` as a float64 numpy array on the CPU."""
    return torch.as_tensor(values).detach().cpu().double().numpy()


def _sums_from_centre(pairs: Callable[[int], Array], n: int) -> Tensor:
    """`costs[l, r] = sum_{t=l..r} pairs(c)[t]`, summed outwards from the centre c.

    Differences of cumulative sums would be shorter, but lose digits where the numbers span
    decades. With sums from the centre, a distance of 0 costs exactly 0.
    """
    costs = np.full((n, n), np.inf)
    flat = costs.reshape(-1)
    for c in range(n):
        row = pairs(c)
        # The segments with centre c are c-j .. c+j (odd length) and c-j .. c+j-1 (even length).
        # Each kind lies on an antidiagonal of `costs`: with j, the row falls by 1 and the column
        # grows by 1, so the flat index falls by n - 1. The slices ascend and are reversed.
        num_odd, num_even = min(c, n - 1 - c), min(c, n - c)
        right = np.cumsum(row[c : c + num_odd + 1])
        left = np.cumsum(row[c - num_even : c][::-1])
        costs[c, c] = right[0]
        if num_odd:
            stop = (c - num_odd) * n + c + num_odd
            segments = flat[stop : c * n + c : n - 1][::-1]
            np.add(left[:num_odd], right[1 : num_odd + 1], out=segments)
        if num_even:
            stop = (c - num_even) * n + c + num_even - 1
            segments = flat[stop : (c - 1) * n + c + 1 : n - 1][::-1]
            np.add(left[:num_even], right[:num_even], out=segments)
    return torch.from_numpy(costs)
