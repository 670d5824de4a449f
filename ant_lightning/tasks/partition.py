"""The partition of timesteps into contiguous segments with the smallest cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ant_lightning.errors import ConfigError, check_at_least

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_BLOCK = 128  # starts that are handled at a time, so that their sums stay in the cache


def partition(costs: Float[Tensor, "T T"], num_tasks: int, *, min_size: int = 1) -> tuple[int, ...]:
    """Boundaries of the `k` contiguous segments with the smallest sum of costs, exactly.

    Dynamic programming in `O(k T²)`: the smallest cost of `m` segments that tile `[i, T)` is

        F_m(i) = min_j costs[i, j - 1] + F_{m-1}(j).

    If several partitions have the smallest cost (as a float64 sum), the most even one is taken,
    which has the smallest sum of squared sizes; if there are several again, the lexicographically
    first.

    Args:
        costs: `costs[l, r]` is the cost of the segment `l .. r`, both ends included; it may be
            negative. Entries with `l > r` are ignored.
        num_tasks: Number of segments `k`.
        min_size: Smallest number of timesteps in a segment.

    Returns:
        `k + 1` increasing integers from 0 to `T`; segment i is `[boundaries[i],
        boundaries[i + 1])`.

    Raises:
        ConfigError: If the costs are not square and finite, or `T` has no room for the segments.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 4, arXiv 2306.00354.

    Examples:
        >>> import torch
        >>> from ant_lightning import partition, snr_costs
        >>> partition(snr_costs(torch.tensor([9.0, 8.0, 1.0, 0.0, -1.0])), num_tasks=2)
        (0, 2, 5)
    """
    table = torch.as_tensor(costs).detach().cpu().double().numpy()
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not table.size:
        raise ConfigError(f"costs: must be a square matrix, found shape {table.shape}")
    num_timesteps = len(table)
    check_at_least(1, num_tasks=num_tasks, min_size=min_size)
    if num_tasks * min_size > num_timesteps:
        most = num_timesteps // min_size
        raise ConfigError(
            f"num_tasks: must be at most {most} with {num_timesteps} timesteps and segments of "
            f"{min_size} or more, found {num_tasks}"
        )
    steps = np.arange(num_timesteps)
    upper = steps[:, None] <= steps
    # Column j - 1 of `segments` is the stop j; segments that are too short have infinite cost.
    segments = np.where(upper, table, np.inf)
    if np.count_nonzero(np.isfinite(segments)) != num_timesteps * (num_timesteps + 1) // 2:
        raise ConfigError("costs: must be finite where l <= r, found a NaN or an infinity")
    if min_size > 1:
        segments[steps[:, None] > steps + 1 - min_size] = np.inf

    # `best[i]` is F_m(i), and `squares[i]` the sum of squared sizes of its segments. First m = 1:
    # one segment from i to the end.
    best = segments[:, -1].copy()
    squares = (num_timesteps - steps.astype(np.float64)) ** 2
    choices = []
    for m in range(2, num_tasks + 1):
        # A start in `low .. high` leaves room for the k - m segments before it and the m after it;
        # for m = k it is 0. The first of these m segments stops in `first .. last`.
        low = (num_tasks - m) * min_size
        high = num_timesteps - m * min_size if m < num_tasks else 0
        first, last = low + min_size, num_timesteps - (m - 1) * min_size
        choice = np.empty(high + 1 - low, dtype=np.intp)
        new_best, new_squares = np.empty(len(choice)), np.empty(len(choice))
        for start in range(low, high + 1, _BLOCK):
            # The first stop of any start in the block. Where a later start makes a segment too
            # short, its cost is infinite.
            after = max(first, start + min_size)
            block = slice(start - low, min(start + _BLOCK, high + 1) - low)
            sums = segments[low:][block, after - 1 : last] + best[after : last + 1]
            choice[block], new_best[block], new_squares[block] = _minimum(
                sums, squares[after : last + 1], start, after
            )
        # Only now: all starts needed F_{m-1}.
        best[low : high + 1], squares[low : high + 1] = new_best, new_squares
        choices.append((low, choice))

    # Forwards from timestep 0: the choices of m = k, k - 1, .. 2 segments.
    boundaries = [0]
    for low, stop in reversed(choices):
        boundaries.append(int(stop[boundaries[-1] - low]))
    return (*boundaries, num_timesteps)


def _minimum(
    sums: Array, squares: Array, low: int, first: int
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.intp]], Array, Array]:
    """Stop, cost and sum of squared sizes of the optimum for each row of `sums`.

    Row a is the start `low + a` of a segment and column b its stop `first + b`; `squares[b]` is
    the sum of squared sizes of the segments after it.
    """
    rows = np.arange(len(sums))
    choice = sums.argmin(axis=1)
    best = sums[rows, choice]
    # More equal sums than rows: some row has a tie.
    equal = sums == best[:, None]
    if np.count_nonzero(equal) > len(sums):
        tied_rows, columns = np.nonzero(equal)  # ascending by row, then by column
        evenness = squares[columns] + (first + columns - low - tied_rows).astype(np.float64) ** 2
        most_even = np.minimum.reduceat(evenness, np.searchsorted(tied_rows, rows))
        winners = np.flatnonzero(evenness == most_even[tied_rows])[::-1]
        # In reversed order: the first of a row's winners is written last, and so stays.
        choice[tied_rows[winners]] = columns[winners]
    lengths = (first + choice - low - rows).astype(np.float64)
    return first + choice, best, squares[choice] + lengths**2
