"""How much of a gradient is signal, seen by comparing two halves of the images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

__all__ = ["reliability_message", "split_half_reliability"]

_LISTED = 8  # timesteps that a message names


def split_half_reliability(half_dots: Float[Tensor, "*c 2 2 n n"]) -> Float[Tensor, "*c n"]:
    """Share of the mean gradient's squared length that is signal, by Spearman and Brown.

    With `r = A_i · B_i / (|A_i| |B_i|)`, the cosine of the halves, it is `2 r / (1 + r)`: 1 without
    noise, 0 (or, by chance, a little below) if the gradient is nothing but noise. It is no less
    than -1, and 0 for a gradient that is exactly 0.

    Reference:
        Brown, "Some experimental results in the correlation of mental abilities", 1910.
    """
    products = half_dots.diagonal(dim1=-2, dim2=-1)
    lengths = (products[..., 0, 0, :] * products[..., 1, 1, :]).clamp(min=0).sqrt()
    r = torch.where(lengths > 0, products[..., 0, 1, :] / lengths, 0.0)
    r = r.clamp(-1 / 3, 1)  # 2r / (1 + r) is -1 at r = -1/3
    return 2 * r / (1 + r)


def reliability_message(
    timesteps: Sequence[int], reliability: Float[Tensor, " n"], *, below: float
) -> str | None:
    """One sentence that names the timesteps whose reliability is below a limit; None if none is."""
    low = [t for t, r in zip(timesteps, reliability.tolist(), strict=True) if r < below]
    if not low:
        return None
    names = ", ".join(map(str, low[:_LISTED])) + (", ..." if len(low) > _LISTED else "")
    worst = int(reliability.argmin())
    return (
        f"split-half reliability is below {below:g} at {len(low)} of {len(timesteps)} timesteps "
        f"({names}; lowest {float(reliability[worst]):.2f} at timestep {timesteps[worst]}): plain "
        "affinity is too near 0 there; use more images, or read the corrected estimate"
    )
