"""Task affinity and its reliability, from dot products of gradients of two halves of the images.

`A_i` and `B_i` are the mean gradients at timestep i of two disjoint halves of images and noise.
All functions take `half_dots [*c, 2, 2, n, n]` with `half_dots[..., 0, 1, i, j] = A_i · B_j`,
`half_dots[..., 0, 0, i, j] = A_i · A_j` and so on; `*c` are any leading dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def plain_affinity(half_dots: Float[Tensor, "*c 2 2 n n"]) -> Float[Tensor, "*c n n"]:
    """Cosine of the mean gradients, `m_i · m_j / (|m_i| |m_j|)` with `m = (A + B) / 2`.

    This is the official definition. Noise lengthens the gradients without aligning them, so the
    cosine is too near 0, by the factor `sqrt(reliability_i reliability_j)`. A gradient of exactly
    0 has cosine 0 with all others and 1 with itself.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 3, arXiv 2306.00354.

    Examples:
        >>> import torch
        >>> from ant_lightning import plain_affinity
        >>> gradients = torch.tensor([[3.0, 0.0], [1.0, 1.0]])  # two timesteps, equal halves
        >>> half_dots = (gradients @ gradients.T).expand(2, 2, 2, 2)
        >>> round(float(plain_affinity(half_dots)[0, 1]), 3)
        0.707
    """
    dots = half_dots.sum(dim=(-4, -3))  # (A_i + B_i) · (A_j + B_j)
    # m_i · m_j: 1/4 for the two means, 1/2 to symmetrise, to the last bit.
    dots = (dots + dots.mT) / 8
    lengths = _diagonal(dots).clamp(min=0).sqrt()
    cosine = (dots * _outer(torch.where(lengths > 0, 1 / lengths, 0.0))).clamp(-1, 1)
    cosine.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return cosine


def corrected_affinity(half_dots: Float[Tensor, "*c 2 2 n n"]) -> Float[Tensor, "*c n n"]:
    """Estimate of the cosine without noise, `sym(A_i · B_j) / sqrt((A_i · B_i) (A_j · B_j))`.

    This is Spearman's correction for attenuation. The noise of A is independent of that of B, so
    no product contains squared noise. Entries are not clipped to ±1: clipping would bias averages.
    An entry is NaN where `A_i · B_i` or `A_j · B_j` is not positive. The diagonal is 1 by
    construction.

    Examples:
        >>> import torch
        >>> from ant_lightning import corrected_affinity
        >>> a, b = torch.tensor([[2.0, 1.0], [1.0, 1.0]]), torch.tensor([[2.0, -1.0], [1.0, 1.0]])
        >>> halves = torch.stack([a, b])
        >>> half_dots = torch.einsum("gip,hjp->ghij", halves, halves)
        >>> round(float(corrected_affinity(half_dots)[0, 1]), 3)
        0.816
    """
    cross = _cross(half_dots)
    signal = _diagonal(cross)
    return cross * _outer(torch.where(signal > 0, signal, torch.nan).rsqrt())


def corrected_standard_error(half_dots: Float[Tensor, "*c 2 2 n n"]) -> Float[Tensor, "*c n n"]:
    """Approximate standard error of `corrected_affinity`, from the data alone.

    `S = A + B` and `D = A - B` have uncorrelated noise of equal size, and D has no signal. So a
    product with one S replaced by D is a draw of the product's first-order error:

        e(sym(A_i · B_j)) = (S_i · D_j + D_i · S_j) / 4,     e(A_i · B_i) = S_i · D_i / 2.

    The error of the quotient follows by differentiation. That gives one draw for each pair (i, j);
    draws are pooled (root mean square) over all pairs of i and all pairs of j. The result covers
    the choice of images and noise. It is 0 on the diagonal, and NaN where the estimate is NaN.
    """
    corrected = corrected_affinity(half_dots)
    aa, ab = half_dots[..., 0, 0, :, :], half_dots[..., 0, 1, :, :]
    ba, bb = half_dots[..., 1, 0, :, :], half_dots[..., 1, 1, :, :]
    s_dot_d = aa - ab + ba - bb  # (A_i + B_i) · (A_j - B_j)
    cross_error = (s_dot_d + s_dot_d.mT) / 4
    signal = _diagonal(_cross(half_dots))
    signal = torch.where(signal > 0, signal, torch.nan)
    relative = _diagonal(cross_error) / signal
    # The error of x / sqrt(y z) is e(x) / sqrt(y z) - x / sqrt(y z) (e(y) / y + e(z) / z) / 2.
    draw = cross_error * _outer(signal.rsqrt())
    draw = draw - corrected / 2 * (relative.unsqueeze(-1) + relative.unsqueeze(-2))
    # The diagonal has no error (the estimate is 1 there) and would lower the pooled value.
    off_diagonal = ~torch.eye(draw.shape[-1], dtype=torch.bool, device=draw.device)
    pooled = torch.where(off_diagonal, draw, torch.nan).square().nanmean(-1)
    error = ((pooled.unsqueeze(-1) + pooled.unsqueeze(-2)) / 2).sqrt()
    error = torch.where(off_diagonal, error, 0.0)
    return torch.where(corrected.isnan(), torch.nan, error)


def split_half_reliability(half_dots: Float[Tensor, "*c 2 2 n n"]) -> Float[Tensor, "*c n"]:
    """Share of the mean gradient's squared length that is signal, `2 r / (1 + r)`.

    `r = A_i · B_i / (|A_i| |B_i|)` is the cosine of the two halves (Spearman-Brown). The result is
    1 without noise, about 0 if the gradient is only noise, and 0 for a gradient of exactly 0. It
    is at least -1.

    Reference:
        Brown, "Some experimental results in the correlation of mental abilities", 1910.

    Examples:
        >>> import torch
        >>> from ant_lightning import split_half_reliability
        >>> halves = torch.tensor([[[2.0, 0.0]], [[1.0, 3**0.5]]])  # the halves have cosine 0.5
        >>> half_dots = torch.einsum("gip,hjp->ghij", halves, halves)
        >>> round(float(split_half_reliability(half_dots)[0]), 3)
        0.667
    """
    products = _diagonal(half_dots)
    lengths = (products[..., 0, 0, :] * products[..., 1, 1, :]).clamp(min=0).sqrt()
    r = torch.where(lengths > 0, products[..., 0, 1, :] / lengths, 0.0)
    r = r.clamp(-1 / 3, 1)  # 2 r / (1 + r) is -1 at r = -1/3
    return 2 * r / (1 + r)


def _cross(half_dots: Tensor) -> Tensor:
    """`sym(A_i · B_j)`."""
    # `half_dots[..., 1, 0, :, :]` is the transpose of this matrix: the mean uses both.
    cross = half_dots[..., 0, 1, :, :]
    return (cross + cross.mT) / 2


def _outer(vector: Tensor) -> Tensor:
    return vector.unsqueeze(-1) * vector.unsqueeze(-2)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)
