"""One step of each sampler, from x_t to its neighbour on the path of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ant_lightning.diffusion.tables import gather

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from ant_lightning.diffusion.process import DiscreteDiffusion, PMeanVariance

__all__ = ["ancestral_step", "ddim_inverse_step", "ddim_step"]


def ancestral_step(
    model: PMeanVariance, timesteps: Int[Tensor, " b"], noise: Float[Tensor, "b c ..."] | None
) -> Float[Tensor, "b c ..."]:
    """Sample p(x_{t-1} | x_t): `mean + exp(½ log_variance) noise`, without noise at t = 0.

    `noise=None` gives the mean.

    Reference: Ho et al., arXiv 2006.11239, algorithm 2.
    """
    if noise is None:
        return model.mean
    return model.mean + _nonzero(timesteps, noise) * (0.5 * model.log_variance).exp() * noise


def ddim_step(
    process: DiscreteDiffusion,
    model: PMeanVariance,
    timesteps: Int[Tensor, " b"],
    *,
    eta: float = 0.0,
    noise: Float[Tensor, "b c ..."] | None = None,
) -> Float[Tensor, "b c ..."]:
    """One DDIM step; `eta = 0` is deterministic, `eta = 1` as random as ancestral sampling.

    `x_{t-1} = sqrt(abar_prev) x_start + sqrt(1 - abar_prev - σ²) eps + σ noise`, with
    `σ = eta sqrt((1 - abar_prev) / (1 - abar)) sqrt(1 - abar / abar_prev)`; no noise at t = 0.

    Reference: Song et al., DDIM, arXiv 2010.02502, equations 12 and 16.
    """
    tables = process.tables(model.x_start.device)
    previous = tables.alphas_cumprod_prev
    variance = eta**2 * tables.posterior_variance
    # In float64 on the tables: 1 - abar_prev - σ² cancels, and may end a little below 0 at eta 1.
    direction = (1 - previous - variance).clamp(min=0).sqrt()
    x = model.x_start
    x_prev = gather(previous.sqrt(), timesteps, x) * x + gather(direction, timesteps, x) * model.eps
    if noise is None or eta == 0:
        return x_prev
    return x_prev + _nonzero(timesteps, x) * gather(variance.sqrt(), timesteps, x) * noise


def ddim_inverse_step(
    process: DiscreteDiffusion, model: PMeanVariance, timesteps: Int[Tensor, " b"]
) -> Float[Tensor, "b c ..."]:
    """One DDIM step backwards, to more noise: `sqrt(abar_next) x_start + sqrt(1 - abar_next) eps`.

    After the last timestep abar_next is 0, which leaves eps.

    Reference: Song et al., arXiv 2010.02502, section 4.3 (the ODE, integrated the other way).
    """
    following = process.tables(model.x_start.device).alphas_cumprod_next
    signal = gather(following.sqrt(), timesteps, model.x_start)
    return signal * model.x_start + gather((1 - following).sqrt(), timesteps, model.eps) * model.eps


def _nonzero(timesteps: Tensor, like: Tensor) -> Tensor:
    return (timesteps != 0).to(like.dtype).view(-1, *[1] * (like.ndim - 1))
