"""Squared Euclidean distances in float64, in blocks that fit a memory budget."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError

__all__ = ["centre_together", "distance_blocks", "paired_distances"]

_BLOCK_ELEMENTS = 4_000_000  # 32 MB of float64 for a block, with a few such temporaries
_PAIR_ELEMENTS = 4_000_000


def centre_together(*points: Tensor) -> tuple[Tensor, ...]:
    """Move point sets ``[n_i, d]`` by one common offset, the mean of the first, in float64.

    Distances do not change, and |a|² + |b|² - 2 a·b loses fewer digits near the origin.

    Raises:
        ConfigError: A set is no matrix, is empty, or has another dimension than the first.
    """
    for values in points:
        if values.ndim != 2 or values.shape[1] != points[0].shape[1] or len(values) == 0:
            raise ConfigError(
                f"features must have shape [n, {points[0].shape[-1]}] with n >= 1, "
                f"got {list(values.shape)}"
            )
    offset = points[0].mean(0, dtype=torch.float64)
    return tuple(values.to(offset) - offset for values in points)


def distance_blocks(queries: Tensor, points: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield ``(rows, squared, error)`` for blocks of rows of ``queries [n, d]``.

    ``squared [rows, m]`` are squared distances to every point of ``points [m, d]`` by
    |a|² + |b|² - 2 a·b, and ``error [rows, m]`` bounds their rounding, that of `centre_together`
    included: what is nearer than that to a threshold is for `paired_distances` to decide.
    """
    point_norms = points.square().sum(1)
    num_rows = max(1, _BLOCK_ELEMENTS // len(points))
    for start in range(0, len(queries), num_rows):
        block = queries[start : start + num_rows]
        scale = block.square().sum(1)[:, None] + point_norms
        squared = torch.addmm(scale, block, points.T, alpha=-2).clamp_(min=0)
        # the bound for any order of summation; the usual rounding is about sqrt(d) eps
        rounding = (2 * points.shape[1] + 8) * torch.finfo(torch.float64).eps
        yield slice(start, start + len(block)), squared, scale.mul_(rounding)


def paired_distances(first: Tensor, second: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances ``[p]`` of ``first[rows]`` to ``second[columns]`` by differences.

    Slower than `distance_blocks`, without its cancellation. Give the features as they are, not
    centred: then equal points are at distance 0 and ties stay ties.
    """
    size = max(1, _PAIR_ELEMENTS // first.shape[1])
    parts = [
        (first[i].double() - second[j].double()).square().sum(1)
        for i, j in zip(rows.split(size), columns.split(size), strict=True)
    ]
    return torch.cat(parts)
