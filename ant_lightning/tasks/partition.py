"""The best cut of a line of timesteps into contiguous segments, by dynamic programming."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

__all__ = ["partition"]

_BLOCK = 128  # starts that are done at a time, so that their sums stay in the cache


def partition(costs: Float[Tensor, "T T"], num_tasks: int, *, min_size: int = 1) -> tuple[int, ...]:
    """Boundaries of the `k` contiguous segments with the smallest sum of costs, exactly.

    With `F_m(i)` the smallest cost of `m` segments that tile `[i, T)`:
    `F_m(i) = min_j costs[i, j - 1] + F_{m-1}(j)`, in `O(k T^2)`.

    Of several optima, the one whose sizes have the smallest sum of squares is taken (the most
    even one), and of these the one that is lexicographically first. Costs count as equal if
    their float64 sums are.

    Args:
        costs: `costs[l, r]` is the cost of the segment `l .. r`, both ends in; it may be
            negative. Entries with `l > r` are ignored.
        num_tasks: Number of segments `k`.
        min_size: Fewest timesteps in a segment.

    Returns:
        `k + 1` increasing integers from 0 to `T`; segment i is `[boundaries[i],
        boundaries[i + 1])`.

    Raises:
        ConfigError: If the costs are not square and finite, or `T` has no room for the segments.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 4, arXiv 2306.00354.
    """
    table = torch.as_tensor(costs).detach().cpu().double().numpy()
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not table.size:
        raise ConfigError(f"costs: a square matrix is needed, found shape {table.shape}")
    num_timesteps = len(table)
    if num_tasks < 1 or min_size < 1:
        raise ConfigError(
            f"num_tasks and min_size: must be at least 1, found {num_tasks} and {min_size}"
        )
    if num_tasks * min_size > num_timesteps:
        raise ConfigError(
            f"num_tasks: {num_tasks} clusters of at least {min_size} timesteps need as many "
            f"timesteps, found {num_timesteps}"
        )
    steps = np.arange(num_timesteps)
    upper = steps[:, None] <= steps
    # Column j - 1 of `segments` is the stop j; too short segments are out of the question.
    segments = np.where(upper, table, np.inf)
    if np.count_nonzero(np.isfinite(segments)) != num_timesteps * (num_timesteps + 1) // 2:
        raise ConfigError("costs: must be finite where l <= r, found a NaN or an infinity")
    if min_size > 1:
        segments[steps[:, None] > steps + 1 - min_size] = np.inf

    # Both of F_m(i), for every start i that has room for m segments.
    best = segments[:, -1].copy()
    squares = (num_timesteps - steps.astype(np.float64)) ** 2
    choices = []
    for m in range(2, num_tasks + 1):
        low = (num_tasks - m) * min_size
        high = num_timesteps - m * min_size if m < num_tasks else 0
        first, last = low + min_size, num_timesteps - (m - 1) * min_size
        choice = np.empty(high + 1 - low, dtype=np.intp)
        new_best, new_squares = np.empty(len(choice)), np.empty(len(choice))
        for start in range(low, high + 1, _BLOCK):
            # Stops at or before the first start of the block are left out.
            after = max(first, start + min_size)
            block = slice(start - low, min(start + _BLOCK, high + 1) - low)
            sums = segments[low:][block, after - 1 : last] + best[after : last + 1]
            choice[block], new_best[block], new_squares[block] = _minimum(
                sums, squares[after : last + 1], start, after
            )
        best[low : high + 1], squares[low : high + 1] = new_best, new_squares
        choices.append((low, choice))

    boundaries = [0]
    for low, stop in reversed(choices):
        boundaries.append(int(stop[boundaries[-1] - low]))
    return (*boundaries, num_timesteps)


def _minimum(
    sums: Array, squares: Array, low: int, first: int
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.intp]], Array, Array]:
    """Smallest sum of each row: its stop, itself, and the squared sizes that go with it.

    Row a is the start `low + a`, column b the stop `first + b` of a segment, `squares[b]` the
    squared sizes of those after it.
    """
    rows = np.arange(len(sums))
    choice = sums.argmin(axis=1)
    best = sums[rows, choice]
    equal = sums == best[:, None]
    if np.count_nonzero(equal) > len(sums):
        tied_rows, columns = np.nonzero(equal)
        evenness = squares[columns] + (first + columns - low - tied_rows).astype(np.float64) ** 2
        most_even = np.minimum.reduceat(evenness, np.searchsorted(tied_rows, rows))
        winners = np.flatnonzero(evenness == most_even[tied_rows])[::-1]
        choice[tied_rows[winners]] = columns[winners]  # backwards: the first is written last
    lengths = (first + choice - low - rows).astype(np.float64)
    return first + choice, best, squares[choice] + lengths**2
