"""Affinity and its noise-corrected estimate, from dot products of half gradients.

Everywhere `A_i` and `B_i` are the gradients at timestep i of two disjoint halves of images and
noise, `half_dots[..., 0, 1, i, j] = A_i · B_j` and so on, and leading dimensions are free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = [
    "corrected_affinity",
    "corrected_standard_error",
    "plain_affinity",
]


def plain_affinity(half_dots: Float[Tensor, "*c 2 2 n n"]) -> Float[Tensor, "*c n n"]:
    """Cosine of the mean gradients, `m_i · m_j / (|m_i| |m_j|)` with `m = (A + B) / 2`.

    The official definition. Noise in the gradients lengthens them but does not align them, so
    this is too near 0 by the factor `sqrt(reliability_i reliability_j)`. A gradient that is
    exactly 0 neither helps nor hinders: its cosine is 0 with others, 1 with itself.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 3, arXiv 2306.00354.
    """
    dots = half_dots.sum(dim=(-4, -3))
    dots = (dots + dots.mT) / 8  # symmetric to the last bit
    inverse = _safe_inverse(_diagonal(dots).clamp(min=0).sqrt())
    cosine = (dots * _outer(inverse)).clamp(-1, 1)
    cosine.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return cosine


def corrected_affinity(half_dots: Float[Tensor, "*c 2 2 n n"]) -> Float[Tensor, "*c n n"]:
    """Estimate of the cosine without noise, `sym(A_i · B_j) / sqrt((A_i · B_i) (A_j · B_j))`.

    The noise of A is independent of that of B, so no squared noise enters. Not clipped: an entry
    may pass ±1 by chance, and clipping would bias averages. NaN where `A_i · B_i` or `A_j · B_j`
    is not positive. The diagonal is 1 by construction.
    """
    cross = _cross(half_dots)
    signal = _diagonal(cross)
    scale = torch.where(signal > 0, signal, torch.nan).rsqrt()
    return cross * _outer(scale)


def corrected_standard_error(half_dots: Float[Tensor, "*c 2 2 n n"]) -> Float[Tensor, "*c n n"]:
    """Approximate standard error of `corrected_affinity`, from the data alone.

    `S = A + B` and `D = A - B` carry equal and independent noise, and D carries no signal. So the
    first-order error of a product is seen by putting D in the place of one S:

        e(sym(A_i · B_j)) = (S_i · D_j + D_i · S_j) / 4,     e(A_i · B_i) = S_i · D_i / 2,

    and the error of the quotient follows by differentiation. One such draw for a pair is pooled
    (root mean square) over the pairs of i and over those of j. It is for images and noise drawn
    anew; 0 on the diagonal, NaN where the estimate is.
    """
    corrected = corrected_affinity(half_dots)
    aa, ab = half_dots[..., 0, 0, :, :], half_dots[..., 0, 1, :, :]
    ba, bb = half_dots[..., 1, 0, :, :], half_dots[..., 1, 1, :, :]
    s_dot_d = aa - ab + ba - bb
    cross_error = (s_dot_d + s_dot_d.mT) / 4
    signal = _diagonal(_cross(half_dots))
    signal = torch.where(signal > 0, signal, torch.nan)
    relative = _diagonal(cross_error) / signal
    scale = signal.rsqrt()
    draw = cross_error * _outer(scale)
    draw = draw - corrected / 2 * (relative.unsqueeze(-1) + relative.unsqueeze(-2))
    n = draw.shape[-1]
    off_diagonal = ~torch.eye(n, dtype=torch.bool, device=draw.device)
    of_row = torch.where(off_diagonal, draw, torch.nan).square().nanmean(-1)
    error = ((of_row.unsqueeze(-1) + of_row.unsqueeze(-2)) / 2).sqrt()
    error = torch.where(off_diagonal, error, 0.0)
    return torch.where(corrected.isnan(), torch.nan, error)


def _cross(half_dots: Tensor) -> Tensor:
    """`sym(A_i · B_j)`."""
    cross = half_dots[..., 0, 1, :, :]
    return (cross + cross.mT) / 2


def _outer(vector: Tensor) -> Tensor:
    return vector.unsqueeze(-1) * vector.unsqueeze(-2)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _safe_inverse(lengths: Tensor) -> Tensor:
    """`1 / lengths`, and 0 where a length is 0."""
    return torch.where(lengths > 0, 1 / lengths, 0.0)
