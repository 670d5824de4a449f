"""The exact likelihood of images under a model of flow matching."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ant_lightning.diffusion.process import at_least_float32
from ant_lightning.diffusion.samplers.flow_field import FlowField
from ant_lightning.diffusion.samplers.runge_kutta import runge_kutta_step, tableau
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float

    from ant_lightning.diffusion.flow import FlowMatching
    from ant_lightning.diffusion.process import Images
    from ant_lightning.diffusion.samplers.base import Denoiser
    from ant_lightning.diffusion.samplers.ode import ODESampler


def flow_log_likelihood(
    process: FlowMatching, denoiser: Denoiser, x_start: Images, *, sampler: ODESampler
) -> tuple[Float[Tensor, " b"], Images]:
    """`log p(x_start)` in nats, `[b]`, and the noise that the images lead to.

    `log p(x_0) = log N(x_1; 0, I) + ∫ div v dt` from 0 to 1. The divergence is exact: one backward
    pass for each of the d values of an image in every network call, so it is for small images only.
    State and divergence are integrated together, at the times of the sampler, upwards.

    Args:
        process: The process of training.
        denoiser: The network, as a sampler calls it, without guidance.
        x_start: Clean images.
        sampler: Its method and times; a fixed method on the path of training.

    Raises:
        ConfigError: If the sampler is adaptive, walks another path, or is for another process.

    Reference:
        Chen et al., "Neural Ordinary Differential Equations", theorem 1, arXiv 1806.07366;
        Lipman et al., "Flow Matching Guide and Code", section 3.8, arXiv 2412.06264.

    Examples:
        >>> import torch
        >>> from ant_lightning import FlowMatching, ODESampler, flow_log_likelihood
        >>> def denoiser(x, t):  # the exact velocity if pixels are standard normal
        ...     t = t.view(-1, 1, 1, 1)
        ...     return (1 - 2 * t) * x / (1 - 2 * t + 2 * t * t)  # with SiT's sign
        >>> x = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
        >>> found, _ = flow_log_likelihood(FlowMatching(), denoiser, x, sampler=ODESampler(50))
        >>> round(found.item(), 3)  # 2 log N(0; 0, 1)
        -1.838
    """
    sampler.check(process)
    if sampler.is_adaptive or sampler.path not in (None, process.path):
        found = sampler.method if sampler.is_adaptive else f"path {sampler.path}"
        raise ConfigError(f"sampler: must be a fixed method on the path of training, found {found}")
    field = FlowField(process, denoiser)
    shape, b = x_start.shape, len(x_start)

    def rates(state: Tensor, t: float) -> Tensor:
        """Velocity and its divergence at `[b, d + 1]`: the images, and the sum so far."""
        with torch.enable_grad():
            x = state[:, :-1].detach().requires_grad_()
            v = field.at(x.view(shape), t).v.flatten(1)
            divergence = torch.zeros(b, dtype=x.dtype, device=x.device)
            for i in range(x.shape[1]):
                (slope,) = torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)
                divergence += slope[:, i]
        return torch.cat([v.detach(), divergence[:, None]], dim=1)

    state = at_least_float32(x_start).flatten(1)
    state = torch.cat([state, torch.zeros_like(state[:, :1])], dim=1)
    for t, t_next in pairwise(sampler.path_times(process)[::-1]):
        state = runge_kutta_step(rates, state, t, t_next, tableau(sampler.method))
    noise, divergence = state[:, :-1], state[:, -1]
    log_prior = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(1)
    return log_prior + divergence, noise.view(shape)
