"""Training losses: mean squared error on the target, and the hybrid loss of a learned variance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ant_lightning.diffusion.forward import gather
from ant_lightning.diffusion.process import DenoisingLoss, per_image
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float

    from ant_lightning.diffusion.forward import Timesteps
    from ant_lightning.diffusion.process import Images


class PMeanVariance(NamedTuple):
    """The model's `p(x_{t-1} | x_t)` and the predictions behind it, `[b, c, ...]` each."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x_start: Tensor
    eps: Tensor


class _ReverseProcess(Protocol):
    """What the losses need of `DiscreteDiffusion`, whose file imports this one."""

    @property
    def num_timesteps(self) -> int: ...

    def target(self, x_start: Images, noise: Images, times: Timesteps) -> Images: ...

    def split_output(self, model_output: Images, channels: int) -> tuple[Images, Images | None]: ...

    def q_posterior(
        self, x_start: Images, x_t: Images, timesteps: Timesteps
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def p_mean_variance(
        self, model_output: Images, x_t: Images, timesteps: Timesteps, *, clip_denoised: bool = True
    ) -> PMeanVariance: ...


def denoising_loss(
    process: _ReverseProcess,
    model_output: Images,
    x_start: Images,
    x_t: Images,
    timesteps: Timesteps,
    noise: Images,
    *,
    weights: Float[Tensor, " T"] | None = None,
    vb_scale: float = 1.0,
) -> DenoisingLoss:
    """Loss of each image, a mean over its own dimensions.

    `loss = weights[t] mean((target - prediction)²) + vb_scale vb`. The second term exists only for
    `learned_range`. It trains the variance alone, because the prediction in it is detached.

    Args:
        process: The process, for its targets and posteriors.
        model_output: Output of the network for `x_t`, `[b, o, ...]`.
        x_start: Clean images `[b, c, ...]`.
        x_t: `process.q_sample(x_start, timesteps, noise)`.
        timesteps: Indices into the tables of the process, `[b]`.
        noise: The noise in `x_t`.
        weights: Weight of each timestep `[T]`, on the mse only.
        vb_scale: 1 is what DiT and ADM train with; T / 1000 is the official "rescaled" loss.

    Raises:
        ConfigError: If `weights` is not `[T]`, or the output has a wrong number of channels.

    Reference:
        Nichol and Dhariwal, "Improved DDPM", equation 16, arXiv 2102.09672. Its factor 0.001 does
        not appear here, as in the official code: the bound is a sum over T timesteps, T times one
        term estimates it, and 0.001 T is 1 for T = 1000.

    Examples:
        >>> import torch
        >>> from ant_lightning import DiscreteDiffusion, denoising_loss
        >>> process, x_start = DiscreteDiffusion(), torch.zeros(2, 3, 8, 8)
        >>> timesteps, noise = torch.tensor([10, 500]), torch.ones(2, 3, 8, 8)
        >>> x_t = process.q_sample(x_start, timesteps, noise)
        >>> output = torch.zeros_like(x_t)  # a network that predicts no noise at all
        >>> denoising_loss(process, output, x_start, x_t, timesteps, noise).loss
        tensor([1., 1.])
    """
    prediction, values = process.split_output(model_output, x_start.shape[1])
    mse = per_image((process.target(x_start, noise, timesteps) - prediction).square())
    loss = mse
    if weights is not None:
        if weights.shape != (process.num_timesteps,):
            raise ConfigError(
                f"weights: must have the shape [{process.num_timesteps}], one for each timestep, "
                f"found {list(weights.shape)}"
            )
        loss = gather(weights.to(mse.device, non_blocking=True), timesteps, mse) * mse
    if values is None:
        return DenoisingLoss(loss=loss, mse=mse, vb=None)
    # Equation 16: the bound trains the variance alone.
    frozen = torch.cat([prediction.detach(), values], dim=1)
    vb = vb_scale * variational_bound(process, frozen, x_start, x_t, timesteps)
    return DenoisingLoss(loss=loss + vb, mse=mse, vb=vb)


def variational_bound(
    process: _ReverseProcess,
    model_output: Images,
    x_start: Images,
    x_t: Images,
    timesteps: Timesteps,
) -> Float[Tensor, " b"]:
    """The term of the variational bound that belongs to each image's timestep, `[b]`.

    For t > 0 it is `KL(q(x_{t-1} | x_t, x_start), p(x_{t-1} | x_t))`, at t = 0 the negative
    log-likelihood of `x_start` as 8-bit pixels; both in bits per dimension.

    Args:
        process: The process, for its posteriors.
        model_output: Output of the network for `x_t`, `[b, o, ...]`.
        x_start: Clean images `[b, c, ...]`.
        x_t: Noised images `[b, c, ...]`.
        timesteps: Indices into the tables of the process, `[b]`.

    Reference:
        Ho et al., equation 5, arXiv 2006.11239.

    Examples:
        >>> import torch
        >>> from ant_lightning import DiscreteDiffusion, variational_bound
        >>> process, x_start = DiscreteDiffusion(), torch.zeros(1, 3, 8, 8)
        >>> t, noise = torch.tensor([500]), torch.ones(1, 3, 8, 8)
        >>> x_t = process.q_sample(x_start, t, noise)
        >>> round(variational_bound(process, noise, x_start, x_t, t).item(), 4)  # exact: no loss
        0.0
    """
    # Not clipped, as in the official training loss.
    true_mean, _, true_log_variance = process.q_posterior(x_start, x_t, timesteps)
    model = process.p_mean_variance(model_output, x_t, timesteps, clip_denoised=False)
    kl = normal_kl(true_mean, true_log_variance, model.mean, model.log_variance)
    nll = -discretized_gaussian_log_likelihood(
        x_start.to(model.mean.dtype), mean=model.mean, log_scale=0.5 * model.log_variance
    )
    # Equation 5: L_0 at t = 0, L_{t-1} elsewhere. Both are computed for every image: to select the
    # images with t = 0, the host would have to wait for the GPU.
    nats = torch.where(timesteps == 0, per_image(nll), per_image(kl))
    return nats / math.log(2)


def normal_kl(mean1: Images, log_variance1: Images, mean2: Images, log_variance2: Images) -> Images:
    """KL divergence of `N(mean1, exp(log_variance1))` from `N(mean2, exp(log_variance2))`, in nats.

    `½ (lv2 - lv1 - 1 + exp(lv1 - lv2) + (m1 - m2)² exp(-lv2))`.
    """
    difference = log_variance1 - log_variance2
    distance = (mean1 - mean2).square() * torch.exp(-log_variance2)
    # expm1 keeps the digits where the two variances nearly agree, at high noise.
    return 0.5 * (torch.expm1(difference) - difference + distance)


def discretized_gaussian_log_likelihood(x: Images, *, mean: Images, log_scale: Images) -> Images:
    """Log-probability, in nats, of the 8-bit bin of `x` under `N(mean, exp(log_scale)²)`.

    `x` holds pixels in [-1, 1]. A bin is 2/255 wide; the bins at -1 and 1 extend to infinity.

    Reference:
        Ho et al., equation 13, arXiv 2006.11239.
    """
    inverse_scale = torch.exp(-log_scale)
    upper = _normal_cdf(inverse_scale * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse_scale * (x - mean - 1 / 255))
    # 0.999, not 1: pixels are rounded floats, and the neighbours of -1 and 1 are 2/255 away.
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    # If a bin has no mass in floating point, the clamp keeps the logarithm and its gradient finite.
    return inside.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Standard normal CDF, in the tanh approximation with which published bounds were computed."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))
