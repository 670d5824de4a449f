"""Training losses: mean squared error on the target, and the hybrid loss of a learned variance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ant_lightning.diffusion.likelihood import discretized_gaussian_log_likelihood, normal_kl
from ant_lightning.diffusion.tables import gather
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from ant_lightning.diffusion.process import DiscreteDiffusion

__all__ = ["DenoisingLoss", "denoising_loss", "variational_bound"]


class DenoisingLoss(NamedTuple):
    """Per image, [b] each: `loss` is minimised; `mse` is unweighted; `vb` in bits per dimension.

    `vb` (with its scale) is None where the variance is not learned.
    """

    loss: Tensor
    mse: Tensor
    vb: Tensor | None


def denoising_loss(
    process: DiscreteDiffusion,
    model_output: Float[Tensor, "b o ..."],
    x_start: Float[Tensor, "b c ..."],
    x_t: Float[Tensor, "b c ..."],
    timesteps: Int[Tensor, " b"],
    noise: Float[Tensor, "b c ..."],
    *,
    weights: Float[Tensor, " T"] | None = None,
    vb_scale: float = 1.0,
) -> DenoisingLoss:
    """Loss of each image, a mean over its own dimensions.

    `loss = weights[t] mean((target - prediction)²) + vb_scale vb`. The second term exists for
    learned_range only and trains only the variance: the prediction is detached in it.

    Args:
        process: gives the targets and the posteriors.
        model_output: what the network gave for x_t.
        x_start: clean images.
        x_t: `process.q_sample(x_start, timesteps, noise)`.
        timesteps: indices into the process' tables.
        noise: the noise in x_t.
        weights: one per timestep, on the mse only.
        vb_scale: 1 is what DiT and ADM train with; T / 1000 is the official "rescaled" loss.

    Raises:
        ConfigError: `weights` has not one entry per timestep, or the output's channels are wrong.

    Reference: Nichol and Dhariwal, Improved DDPM, arXiv 2102.09672, equation 16. Its factor
    0.001 is absent, as in the official code: one timestep's term stands for the sum over 1000.
    """
    prediction, values = process.split_output(model_output, x_start.shape[1])
    mse = _per_image((process.target(x_start, noise, timesteps) - prediction).square())
    weighted = mse
    if weights is not None:
        if weights.shape != (process.num_timesteps,):
            raise ConfigError(
                f"weights must have shape ({process.num_timesteps},), one per timestep, "
                f"found {tuple(weights.shape)}"
            )
        weighted = gather(weights.to(mse.device, non_blocking=True), timesteps, mse) * mse
    if values is None:
        return DenoisingLoss(loss=weighted, mse=mse, vb=None)
    frozen = torch.cat([prediction.detach(), values], dim=1)
    vb = vb_scale * variational_bound(process, frozen, x_start, x_t, timesteps)
    return DenoisingLoss(loss=weighted + vb, mse=mse, vb=vb)


def variational_bound(
    process: DiscreteDiffusion,
    model_output: Float[Tensor, "b o ..."],
    x_start: Float[Tensor, "b c ..."],
    x_t: Float[Tensor, "b c ..."],
    timesteps: Int[Tensor, " b"],
) -> Float[Tensor, " b"]:
    """One timestep's term of the variational bound, in bits per dimension, [b].

    KL(q(x_{t-1} | x_t, x_start), p(x_{t-1} | x_t)) for t > 0; at t = 0 the negative
    log-likelihood of x_start as 8-bit pixels.

    Reference: Ho et al., arXiv 2006.11239, equation 5.
    """
    true_mean, _, true_log_variance = process.q_posterior(x_start, x_t, timesteps)
    model = process.p_mean_variance(model_output, x_t, timesteps, clip_denoised=False)
    kl = normal_kl(true_mean, true_log_variance, model.mean, model.log_variance)
    nll = -discretized_gaussian_log_likelihood(
        x_start.to(model.mean.dtype), mean=model.mean, log_scale=0.5 * model.log_variance
    )
    nats = torch.where(timesteps == 0, _per_image(nll), _per_image(kl))
    return nats / math.log(2)


def _per_image(values: Tensor) -> Tensor:
    """Mean over all dimensions but the first."""
    return values.flatten(start_dim=1).mean(dim=1)
