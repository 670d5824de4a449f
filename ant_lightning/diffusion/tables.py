"""The float64 tables that a diffusion process looks its coefficients up in."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["Tables", "at_least_float32", "gather", "make_tables"]


class Tables(NamedTuple):
    """One float64 value per timestep, [T] each; the names are the field's.

    `fixed_large_variance` is `betas` with the first entry replaced by that of the posterior.
    """

    betas: Tensor
    log_betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    alphas_cumprod_next: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    fixed_large_variance: Tensor
    fixed_large_log_variance: Tensor

    def to(self, device: torch.device) -> Tables:
        """Copy the tables to a device (in float32 where it has no float64)."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return Tables(*(table.to(device=device, dtype=dtype) for table in self))


def make_tables(betas: Float[Tensor, " T"]) -> Tables:
    """Compute every table from `betas` [T].

    With `abar = Π (1 - beta)` and `abar_prev` its shift (1 in front):
    `posterior_variance = beta (1 - abar_prev) / (1 - abar)`,
    `posterior_mean = sqrt(abar_prev) beta / (1 - abar) x_start
    + sqrt(1 - beta) (1 - abar_prev) / (1 - abar) x_t`.

    Reference: Ho et al., arXiv 2006.11239, equations 6 and 7.
    """
    betas = betas.to(torch.float64)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    one, zero = betas.new_ones(1), betas.new_zeros(1)
    previous = torch.cat([one, alphas_cumprod[:-1]])
    variance = betas * (1 - previous) / (1 - alphas_cumprod)
    # The posterior at t = 0 has no variance: its logarithm repeats that of t = 1. A process of
    # one timestep has no t = 1; its only step adds no noise, so beta is as good as any.
    first = variance[1:2] if len(betas) > 1 else betas
    clipped = torch.cat([first, variance[1:]])
    large = torch.cat([first, betas[1:]])
    return Tables(
        betas=betas,
        log_betas=betas.log(),
        alphas_cumprod=alphas_cumprod,
        alphas_cumprod_prev=previous,
        alphas_cumprod_next=torch.cat([alphas_cumprod[1:], zero]),
        sqrt_alphas_cumprod=alphas_cumprod.sqrt(),
        sqrt_one_minus_alphas_cumprod=(1 - alphas_cumprod).sqrt(),
        posterior_variance=variance,
        posterior_log_variance_clipped=clipped.log(),
        posterior_mean_coef1=betas * previous.sqrt() / (1 - alphas_cumprod),
        posterior_mean_coef2=(1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
        fixed_large_variance=large,
        fixed_large_log_variance=large.log(),
    )


def at_least_float32(x: Tensor) -> torch.dtype:
    """The dtype to compute in: that of x, but float32 for the half precisions."""
    return torch.promote_types(x.dtype, torch.float32)


def gather(
    table: Float[Tensor, " T"], timesteps: Int[Tensor, " b"], like: Float[Tensor, "b ..."]
) -> Float[Tensor, "b ..."]:
    """Look `table` up at `timesteps`, shaped [b, 1, ...] to multiply `like`, in its dtype.

    Raises:
        IndexError: a timestep is negative or not below T (on the CPU; an accelerator asserts).
    """
    # index_select, unlike plain indexing, refuses a negative timestep instead of wrapping.
    values = table.index_select(0, timesteps)
    return values.to(at_least_float32(like)).view(-1, *[1] * (like.ndim - 1))
