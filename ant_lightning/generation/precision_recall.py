"""Improved precision and recall: how much of one set lies in the k-nearest-neighbour manifold of
the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError
from ant_lightning.generation.distances import centre_together, distance_blocks, paired_distances

__all__ = ["PrecisionRecall", "manifold_membership", "neighbour_radii", "precision_recall"]


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: generated in the real manifold, real in the generated manifold."""

    precision: float
    recall: float


def precision_recall(real: Tensor, generated: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Precision and recall of generated features against real ones, exact in float64.

    Every point of a set owns the closed ball that reaches its k-th nearest neighbour within the
    set, itself not counted; the manifold is the union of the balls. Precision is the share of
    generated points inside the real manifold, recall the share of real points inside the
    generated one. The official evaluator computes distances in float16, this one does not.

    Args:
        real: Features ``[n, d]``.
        generated: Features ``[m, d]``.
        k: The neighbour that sets the radius.

    Raises:
        ConfigError: k is not in 1 to min(n, m) - 1, or the dimensions differ.

    Reference:
        Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative
        Models", arXiv 1904.06991, equations (1) and (2).
    """
    inside_real, inside_generated = manifold_membership(real, generated, k=k)
    return PrecisionRecall(
        inside_real.double().mean().item(), inside_generated.double().mean().item()
    )


def manifold_membership(real: Tensor, generated: Tensor, *, k: int = 3) -> tuple[Tensor, Tensor]:
    """Which generated points ``[m]`` the real manifold holds, and which real ``[n]`` the other.

    Distances go by blocks: memory beyond the float64 copies of the features is about 0.2 GiB.
    """
    near_real, near_generated = centre_together(real, generated)
    real_radii, generated_radii = neighbour_radii(real, k=k), neighbour_radii(generated, k=k)
    in_real = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    in_generated = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, squared, error in distance_blocks(near_generated, near_real):
        for radii, found, dim in (
            (real_radii, in_real[rows], 1),
            (generated_radii[rows, None], in_generated, 0),
        ):
            gap = squared - radii
            found.logical_or_((gap <= -error).any(dim))
            # what rounding could flip is decided by differences: a copy of a real image, and
            # the neighbour on the edge of a ball, are inside
            close = gap.abs_() < error
            close &= ~(found[:, None] if dim == 1 else found[None])
            i, j = close.nonzero(as_tuple=True)
            if len(i):
                exact = paired_distances(generated[rows], real, i, j)
                inside = exact <= radii.expand_as(squared)[i, j]
                found[(i if dim == 1 else j)[inside]] = True
    return in_real, in_generated


def neighbour_radii(features: Tensor, *, k: int) -> Tensor:
    """Squared distance ``[n]`` of each of ``features [n, d]`` to its k-th nearest neighbour.

    Raises:
        ConfigError: k is not in 1 to n - 1.
    """
    if not 1 <= k < len(features):
        raise ConfigError(
            f"k must be at least 1 and less than the number of images ({len(features)}), got {k}"
        )
    (near,) = centre_together(features)
    radii = near.new_empty(len(near))
    num_candidates = min(k + 3, len(features) - 1)  # near ties may change places by rounding
    for rows, squared, _ in distance_blocks(near, near):
        index = torch.arange(rows.start, rows.stop, device=features.device)
        squared[torch.arange(len(index), device=features.device), index] = torch.inf
        nearest = squared.topk(num_candidates, dim=1, largest=False).indices
        exact = paired_distances(
            features, features, index.repeat_interleave(num_candidates), nearest.flatten()
        )
        radii[rows] = exact.view(-1, num_candidates).sort(1).values[:, k - 1]
    return radii
