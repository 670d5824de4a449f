"""At which noise levels a sampler of EDM calls the network, and which time and scale it keeps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch

from ant_lightning.diffusion.preconditioning import IDDPMPreconditioning
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

Discretization: TypeAlias = Literal["edm", "vp", "ve", "iddpm"]
Schedule: TypeAlias = Literal["linear", "vp", "ve"]

_FIRST_TIME = 1e-3  # of VP: its time runs from 1 to 1e-3, not to 0
_VP_BETAS = (19.9, 0.1)  # beta_d and beta_min behind the default range of VP


class SigmaSchedule(NamedTuple):
    """A noise level as a function of time, `sigma(t)`, its derivative, and its inverse."""

    sigma: Callable[[float], float]
    derivative: Callable[[float], float]
    time: Callable[[float], float]


def sigma_range(discretization: Discretization) -> tuple[float, float]:
    """The least and the largest noise level that a discretisation has by default.

    Reference:
        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", table 1
        and appendix C, arXiv 2206.00364.

    Examples:
        >>> from ant_lightning.diffusion.samplers.noise_levels import sigma_range
        >>> sigma_range("edm")
        (0.002, 80.0)
    """
    if discretization == "vp":
        sigma = _vp_schedule(*_VP_BETAS).sigma
        return sigma(_FIRST_TIME), sigma(1.0)
    return {"edm": (0.002, 80.0), "ve": (0.02, 100.0), "iddpm": (0.002, 81.0)}[discretization]


def sigma_steps(
    discretization: Discretization,
    num_steps: int,
    *,
    sigma_min: float,
    sigma_max: float,
    rho: float = 7.0,
) -> Float[Tensor, " n"]:
    """The noise levels of the network calls, decreasing, without the 0 at the end.

    With i from 0 to n - 1:

    - `edm`: `(max^(1/rho) + i/(n-1) (min^(1/rho) - max^(1/rho)))^rho`.
    - `vp`: `sqrt(exp(½ beta_d t² + beta_min t) - 1)` at even t from 1 to 0.001, with the betas that
      lead from `sigma_min` to `sigma_max`.
    - `ve`: geometric, `max (min/max)^(i/(n-1))`.
    - `iddpm`: evenly picked from the table of improved-diffusion's cosine schedule inside
      `[sigma_min, sigma_max]`, whose ends it hits only nearly.

    A path of one step has `sigma_max` alone.

    Args:
        discretization: Which of these.
        num_steps: n, at least 1.
        sigma_min: The least noise level.
        sigma_max: The largest one.
        rho: Of `edm` only: how dense the levels are near 0.

    Raises:
        ConfigError: If the table of `iddpm` has fewer than n levels in the range.

    Reference:
        Karras et al., table 1 and equation 5, arXiv 2206.00364.

    Examples:
        >>> from ant_lightning.diffusion.samplers.noise_levels import sigma_steps
        >>> levels = sigma_steps("edm", 4, sigma_min=0.002, sigma_max=80.0)
        >>> [round(level, 3) for level in levels.tolist()]
        [80.0, 9.723, 0.47, 0.002]
    """
    part = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    if discretization == "edm":
        high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
        return torch.pow(high + part * (low - high), rho)  # equation 5
    if discretization == "vp":
        sigma = _vp_schedule(*_vp_betas(sigma_min, sigma_max)).sigma
        times = (1 + part * (_FIRST_TIME - 1)).tolist()
        return torch.tensor([sigma(t) for t in times], dtype=torch.float64)
    if discretization == "ve":
        return (sigma_max**2 * (sigma_min**2 / sigma_max**2) ** part).sqrt()
    table = IDDPMPreconditioning().table
    table = table[(table >= sigma_min) & (table <= sigma_max)]
    if num_steps > len(table):
        raise ConfigError(
            f"num_steps: must be at most the {len(table)} noise levels of iddpm from {sigma_min:g} "
            f"to {sigma_max:g}, found {num_steps}"
        )
    return table[((len(table) - 1) * part).round().long()]


def sigma_schedule(name: Schedule, *, sigma_min: float, sigma_max: float) -> SigmaSchedule:
    """The noise level over the time in which the ODE is solved.

    `linear` is `sigma = t`, the choice of EDM; `ve` is `sqrt(t)`; `vp` is
    `sqrt(exp(½ beta_d t² + beta_min t) - 1)`, with the betas that lead from `sigma_min` to
    `sigma_max`.

    Reference:
        Karras et al., table 1, arXiv 2206.00364.
    """
    if name == "vp":
        return _vp_schedule(*_vp_betas(sigma_min, sigma_max))
    if name == "ve":
        return SigmaSchedule(math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda sigma: sigma**2)
    return SigmaSchedule(lambda t: t, lambda t: 1.0, lambda sigma: sigma)


def _vp_betas(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """The `beta_d` and `beta_min` with `sigma(1e-3) = sigma_min` and `sigma(1) = sigma_max`."""
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / _FIRST_TIME - high) / (_FIRST_TIME - 1)
    return beta_d, high - 0.5 * beta_d


def _vp_schedule(beta_d: float, beta_min: float) -> SigmaSchedule:
    def sigma(t: float) -> float:
        # expm1, because near t = 0 the exponential is 1 and a few digits.
        return math.sqrt(math.expm1(0.5 * beta_d * t**2 + beta_min * t))

    def derivative(t: float) -> float:
        return 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t))

    def time(level: float) -> float:
        root = math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(level**2))
        # (root - beta_min) / beta_d, without the cancellation for small levels.
        return 2 * math.log1p(level**2) / (root + beta_min)

    return SigmaSchedule(sigma, derivative, time)
