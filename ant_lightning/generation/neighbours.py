"""Nearest neighbours of features: precision, recall, and distance to the training images.

Distances are float64, in blocks that fit a memory budget, and every decision is exact: the fast
|a|² + |b|² - 2 a·b finds candidates, and differences decide where its rounding could. Copies of
real images, which a model that memorises draws, lie exactly on the edge of a neighbourhood.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PrecisionRecall", "nearest_distance", "precision_recall"]

_BLOCK_ELEMENTS = 4_000_000  # 32 MB of float64, of which a few are there at a time


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: generated in the real manifold, real in the generated manifold."""

    precision: float
    recall: float


def precision_recall(real: Tensor, generated: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Precision and recall of generated features against real ones, exact in float64.

    Every point of a set owns the closed ball that reaches its k-th nearest neighbour within the
    set, itself not counted; the manifold is the union of the balls. Precision is the share of
    generated points inside the real manifold, recall the share of real points inside the
    generated one. The official evaluator computes distances in float16.

    Args:
        real: Features `[n, d]`.
        generated: Features `[m, d]`.
        k: The neighbour that sets the radius.

    Raises:
        ConfigError: `k` is not in 1 to min(n, m) - 1, or the dimensions differ.

    Reference:
        Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative
        Models", equations (1) and (2), arXiv 1904.06991.

    Examples:
        >>> import torch
        >>> from ant_lightning import precision_recall
        >>> real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
        >>> generated = torch.tensor([[0.5], [1.5], [30.0], [40.0]])
        >>> precision_recall(real, generated, k=1)
        PrecisionRecall(precision=0.5, recall=0.75)
    """
    inside_real, inside_generated = manifold_membership(real, generated, k=k)
    return PrecisionRecall(
        inside_real.double().mean().item(), inside_generated.double().mean().item()
    )


def nearest_distance(generated: Tensor, train: Tensor) -> Tensor:
    """Euclidean distance `[n]` of each generated image to the nearest training image.

    A model that memorises has a low FID to its training images and distances near 0; compare with
    the distances of held-out images. It takes features and pixels alike.

    Args:
        generated: `[n, ...]`, flattened to `[n, d]`.
        train: `[m, ...]`, flattened to `[m, d]`.

    Returns:
        float64 distances; exactly 0 for an exact copy.

    Raises:
        ConfigError: The dimensions differ or a set is empty.

    Examples:
        >>> import torch
        >>> from ant_lightning import nearest_distance
        >>> nearest_distance(torch.tensor([[0.0, 3.0]]), torch.tensor([[4.0, 0.0], [9.0, 9.0]]))
        tensor([5.], dtype=torch.float64)
    """
    train = train.flatten(1).to(generated.device)
    return _kth_squared(generated.flatten(1), train, k=1).sqrt_()


def neighbour_radii(features: Tensor, *, k: int) -> Tensor:
    """Squared distance `[n]` of each of `features [n, d]` to its k-th nearest neighbour.

    Raises:
        ConfigError: `k` is not in 1 to n - 1.
    """
    if not 1 <= k < len(features):
        raise ConfigError(
            f"k: must be at least 1 and less than the number of images ({len(features)}), found {k}"
        )
    return _kth_squared(features, features, k=k, skip_self=True)


def manifold_membership(real: Tensor, generated: Tensor, *, k: int = 3) -> tuple[Tensor, Tensor]:
    """Which generated points `[m]` the real manifold holds, and which real `[n]` the other.

    Memory beyond the float64 copies of the features is about 0.2 GiB.
    """
    near_real, near_generated = _centred(real, generated)
    real_radii, generated_radii = neighbour_radii(real, k=k), neighbour_radii(generated, k=k)
    in_real = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    in_generated = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, squared, error in _distance_blocks(near_generated, near_real):
        for radii, found, dim in (
            (real_radii, in_real[rows], 1),
            (generated_radii[rows, None], in_generated, 0),
        ):
            gap = squared - radii
            found.logical_or_((gap <= -error).any(dim))
            close = gap.abs_() < error
            close &= ~(found[:, None] if dim == 1 else found[None])
            i, j = close.nonzero(as_tuple=True)
            inside = _exact_squared(generated[rows], real, i, j) <= radii.expand_as(squared)[i, j]
            found[(i if dim == 1 else j)[inside]] = True
    return in_real, in_generated


def _kth_squared(queries: Tensor, points: Tensor, *, k: int, skip_self: bool = False) -> Tensor:
    """Squared distance `[n]` of each query `[n, d]` to its k-th nearest point `[m, d]`."""
    near_points, near_queries = _centred(points, queries)
    kth = near_queries.new_empty(len(queries))
    num_candidates = min(k + 3, len(points) - skip_self)  # rounding may swap near ties
    for rows, squared, _ in _distance_blocks(near_queries, near_points):
        index = torch.arange(rows.start, rows.stop, device=queries.device)
        if skip_self:
            squared[index - rows.start, index] = torch.inf
        nearest = squared.topk(num_candidates, dim=1, largest=False).indices
        exact = _exact_squared(
            queries, points, index.repeat_interleave(num_candidates), nearest.flatten()
        )
        kth[rows] = exact.view(-1, num_candidates).sort(1).values[:, k - 1]
    return kth


def _centred(*points: Tensor) -> tuple[Tensor, ...]:
    """Point sets `[n_i, d]` less the mean of the first, in float64.

    Distances do not change, and |a|² + |b|² - 2 a·b loses fewer digits near the origin.
    """
    for values in points:
        if values.ndim != 2 or values.shape[1] != points[0].shape[1] or len(values) == 0:
            raise ConfigError(
                f"features: must have shape [n, {points[0].shape[-1]}] with n >= 1, "
                f"found {list(values.shape)}"
            )
    offset = points[0].mean(0, dtype=torch.float64)
    return tuple(values.to(offset) - offset for values in points)


def _distance_blocks(queries: Tensor, points: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For blocks of rows of `queries [n, d]`: the rows, their squared distances `[rows, m]` to
    `points [m, d]` by |a|² + |b|² - 2 a·b, and a bound of the rounding of each."""
    point_norms = points.square().sum(1)
    num_rows = max(1, _BLOCK_ELEMENTS // len(points))
    for start in range(0, len(queries), num_rows):
        block = queries[start : start + num_rows]
        scale = block.square().sum(1)[:, None] + point_norms
        squared = torch.addmm(scale, block, points.T, alpha=-2).clamp_(min=0)
        # Holds for any order of summation, and includes `_centred`; usual is about sqrt(d) eps.
        rounding = (2 * points.shape[1] + 8) * torch.finfo(torch.float64).eps
        yield slice(start, start + len(block)), squared, scale.mul_(rounding)


def _exact_squared(first: Tensor, second: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances `[p]` of `first[rows]` to `second[columns]` by differences.

    Of features as they are, not centred: equal points are at distance 0 and ties stay ties.
    """
    size = max(1, _BLOCK_ELEMENTS // first.shape[1])
    parts = [
        (first[i].double() - second[j].double()).square().sum(1)
        for i, j in zip(rows.split(size), columns.split(size), strict=True)
    ]
    return torch.cat(parts)
