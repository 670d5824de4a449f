"""The times at which a sampler of flow matching calls the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.diffusion.samplers.noise_levels import sigma_range, sigma_steps
from ant_lightning.errors import check_between

if TYPE_CHECKING:
    from ant_lightning.diffusion.flow import FlowMatching


def sampling_interval(process: FlowMatching, margin: float | None = None) -> tuple[float, float]:
    """First and last time of a path from noise to data, `(start, stop)`, in our time (1 is noise).

    The velocity is finite at both ends if the network predicts it and the path is linear or GVP;
    the path is then all of [0, 1]. Otherwise its formula divides by 0 at an end, which is left out
    by `margin`: at the data end for the VP path, at both ends for the other predictions.

    Args:
        process: The process of training.
        margin: What is left out where that is needed; `None` for 0.001, as SiT.

    Raises:
        ConfigError: If the margin is not above 0 and below 0.5.

    Reference:
        `Transport.check_interval` of SiT; Ma et al., arXiv 2401.08740.
    """
    margin = 1e-3 if margin is None else margin
    check_between(0, 0.5, margin=margin)
    if process.path == "vp":
        return 1.0, margin
    return (1.0, 0.0) if process.prediction_type == "v" else (1 - margin, margin)


def even_times(start: float, stop: float, num_steps: int) -> list[float]:
    """The `num_steps + 1` evenly spaced times from `start` to `stop`."""
    return torch.linspace(start, stop, num_steps + 1, dtype=torch.float64).tolist()


def shifted(t: float, shift: float) -> float:
    """`shift t / (1 + (shift - 1) t)`: above 1, a path spends more of its steps near the noise.

    Reference:
        Esser et al., "Scaling Rectified Flow Transformers", equation 23, arXiv 2403.03206.

    Examples:
        >>> from ant_lightning.diffusion.samplers.flow_times import shifted
        >>> shifted(0.5, 3.0), shifted(1.0, 3.0)
        (0.75, 1.0)
    """
    return shift * t / (1 + (shift - 1) * t)


def flux_mu(num_tokens: int) -> float:
    """Flux's logarithm of the shift: linear in the number of tokens, 0.5 at 256, 1.15 at 4096.

    `DiffusersSampler(..., mu=mu)` of a scheduler with `use_dynamic_shifting` and
    `ODESampler(shift=math.exp(mu))` take it.

    Reference:
        `calculate_shift` of diffusers' Flux pipeline.

    Examples:
        >>> from ant_lightning.diffusion.samplers.flow_times import flux_mu
        >>> round(flux_mu(1024), 4)
        0.63
    """
    return 0.5 + (1.15 - 0.5) / (4096 - 256) * (num_tokens - 256)


def edm_times(num_steps: int, *, rho: float = 7.0) -> list[float]:
    """EDM's noise levels as times `sigma / (1 + sigma)` of the linear path, and 0 at the end.

    The path starts at t = 80/81, where x is taken as standard normal.

    Reference:
        `get_time_discretization` of flow_matching's image example; Lipman et al., arXiv 2412.06264.
    """
    low, high = sigma_range("edm")
    sigmas = sigma_steps("edm", num_steps, sigma_min=low, sigma_max=high, rho=rho)
    return [*(sigmas / (1 + sigmas)).tolist(), 0.0]
