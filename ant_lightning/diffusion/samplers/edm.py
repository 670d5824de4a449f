"""EDM's second-order sampler, with and without churn, and the samplers it was compared to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ant_lightning.diffusion.edm import EDM
from ant_lightning.diffusion.preconditioning import EDMPreconditioning, IDDPMPreconditioning
from ant_lightning.diffusion.samplers.base import Denoiser, Sampler, SampleStep
from ant_lightning.diffusion.samplers.noise_levels import (
    Discretization,
    Schedule,
    SigmaSchedule,
    sigma_range,
    sigma_schedule,
    sigma_steps,
)
from ant_lightning.diffusion.samplers.runge_kutta import tableau
from ant_lightning.errors import ConfigError, check_at_least, check_one_of, check_positive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_METHODS = ("euler", "midpoint", "heun", "ralston")


class EDMSampler(Sampler):
    """EDM's sampler: Heun steps over decreasing noise levels, the last one to 0 by Euler.

    With `D` the network's estimate of the image, a deterministic step of the default settings is
    `x + (sigma_next - sigma) (x - D) / sigma`, corrected by the slope at its end. With churn
    (`S_churn` above 0), noise is first added in steps with `sigma` in `[S_min, S_max]`:
    `sigma_hat = sigma (1 + min(S_churn / num_steps, sqrt(2) - 1))`.

    n steps of a second-order method make 2 n - 1 network calls. Noise is drawn in steps with churn
    only, as in EDM2. The states have the precision of the noise; the official code has float64.

    `discretization`, `schedule` and `scaling` reproduce other samplers of the field: `vp`, `vp`,
    `vp` that of Song et al.'s VP, `ve`, `ve`, `none` their VE, `iddpm`, `linear`, `none` that of
    improved DDPM.

    Args:
        num_steps: Noise levels of a path.
        sigma_min: The last noise level before 0; by default that of the discretisation or of the
            process.
        sigma_max: The first noise level, likewise.
        rho: How dense the levels of `edm` are near 0.
        S_churn: Strength of the churn; 0 for a deterministic path.
        S_min: Smallest noise level with churn.
        S_max: Largest noise level with churn.
        S_noise: Factor of the noise that churn adds.
        method: `heun`, `midpoint`, `ralston` (all second order), or `euler`.
        discretization: The noise levels: `edm`, `vp`, `ve` or `iddpm`; see `sigma_steps`.
        schedule: The time in which steps are made: `linear`, `vp` or `ve`; see `sigma_schedule`.
        scaling: `vp` keeps the state at unit variance, `x / sqrt(1 + sigma²)`.

    Raises:
        ConfigError: If a setting is out of range or unknown. When sampling starts: if a noise level
            is outside the range that the network was trained for.

    Reference:
        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
        algorithms 1 and 2, table 1, arXiv 2206.00364.

    Examples:
        >>> import torch
        >>> from ant_lightning import EDM, EDMSampler
        >>> process = EDM()
        >>> def denoiser(x, sigma):  # the exact network if all pixels of all images are 0.5
        ...     image = torch.full_like(x, 0.5)
        ...     return process.convert("F", image, x, sigma, prediction_type="x0")
        >>> images = EDMSampler(num_steps=18).sample(process, denoiser, torch.randn(2, 3, 4, 4))
        >>> images.shape, round(images.mean().item(), 3)
        (torch.Size([2, 3, 4, 4]), 0.5)
    """

    process_type = EDM

    def __init__(
        self,
        num_steps: int = 18,
        *,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float = 7.0,
        S_churn: float = 0.0,
        S_min: float = 0.0,
        S_max: float = math.inf,
        S_noise: float = 1.0,
        method: Literal["heun", "midpoint", "ralston", "euler"] = "heun",
        discretization: Discretization = "edm",
        schedule: Schedule = "linear",
        scaling: Literal["none", "vp"] = "none",
    ) -> None:
        check_at_least(1, num_steps=num_steps)
        check_at_least(0, S_churn=S_churn, S_min=S_min, S_noise=S_noise)
        check_one_of(_METHODS, method=method)
        check_one_of(get_args(Discretization), discretization=discretization)
        check_one_of(get_args(Schedule), schedule=schedule)
        check_one_of(("none", "vp"), scaling=scaling)
        check_positive(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
        if not S_max >= S_min:
            raise ConfigError(f"S_max: must be at least S_min {S_min}, found {S_max}")
        self.num_steps = num_steps
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.rho = rho
        self.S_churn = S_churn
        self.S_min = S_min
        self.S_max = S_max
        self.S_noise = S_noise
        self.method = method
        self.discretization: Discretization = discretization
        self.schedule: Schedule = schedule
        self.scaling = scaling

    @property
    def is_random(self) -> bool:
        """Whether `S_churn` is above 0."""
        return self.S_churn > 0

    def sigmas(self, process: EDM) -> list[float]:
        """The noise levels of the path, decreasing, without the 0 at its end."""
        low, high = self._range(process)
        levels = sigma_steps(
            self.discretization, self.num_steps, sigma_min=low, sigma_max=high, rho=self.rho
        )
        return [_rounded(process, level) for level in levels.tolist()]

    def _check_path(self, process: EDM) -> None:
        self.sigmas(process)

    def path_length(self, process: EDM) -> int:
        """Number of steps of a whole path."""
        return self.num_steps

    def num_calls(self, process: EDM) -> int:
        """Number of network calls on a whole path."""
        return self.num_steps if self.method == "euler" else 2 * self.num_steps - 1

    def _range(self, process: EDM) -> tuple[float, float]:
        """The least and the largest noise level of the path, checked."""
        low, high = sigma_range(self.discretization)
        lowest, highest = process.min_time, process.max_time
        if not isinstance(process.preconditioning, EDMPreconditioning):
            # As in the official code: defaults end where the network does.
            low, high = max(low, lowest), min(high, highest)
        elif self.discretization == "edm":
            low, high = lowest, highest
        for name, value in (("sigma_min", self.sigma_min), ("sigma_max", self.sigma_max)):
            beyond = value is not None and not lowest <= value <= highest
            # A network of EDM is defined at every level, and training draws beyond its axis.
            if beyond and not isinstance(process.preconditioning, EDMPreconditioning):
                raise ConfigError(
                    f"{name}: must be in [{lowest:.4g}, {highest:.4g}], the noise levels of "
                    f"{type(process.preconditioning).__name__}, found {value}"
                )
        low = low if self.sigma_min is None else self.sigma_min
        high = high if self.sigma_max is None else self.sigma_max
        if not low < high:
            raise ConfigError(f"sigma_min: must be below sigma_max {high:g}, found {low:g}")
        return low, high

    def _scale(self, sigma: float) -> float:
        return 1 / math.sqrt(1 + sigma**2) if self.scaling == "vp" else 1.0

    def _scale_rate(self, sigma: float, sigma_rate: float) -> float:
        return -sigma * sigma_rate * self._scale(sigma) ** 3 if self.scaling == "vp" else 0.0

    def _steps(
        self,
        process: EDM,
        denoiser: Denoiser,
        x: Tensor,
        *,
        noise: Callable[[], Tensor] | None,
        clip_denoised: bool,
        first_step: int,
    ) -> Iterator[SampleStep]:
        low, high = self._range(process)
        schedule = sigma_schedule(self.schedule, sigma_min=low, sigma_max=high)
        times = [schedule.time(sigma) for sigma in self.sigmas(process)] + [0.0]
        if first_step == 0:  # a later state has its noise already
            start = schedule.sigma(times[0])
            x = x * (start * self._scale(start))

        def slope(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            """`dx/dt` (Karras et al., equation 4 and algorithm 1) and the estimated image."""
            sigma, rate = schedule.sigma(t), schedule.derivative(t)
            scale = self._scale(sigma)
            x_start = _denoised(process, denoiser, x / scale, sigma, clip_denoised)
            of_x = rate / sigma + self._scale_rate(sigma, rate) / scale
            return of_x * x - (rate * scale / sigma) * x_start, x_start

        second = tableau(self.method)
        for index in range(first_step, self.num_steps):
            t, t_next = times[index], times[index + 1]
            x, t = self._churned(process, schedule, x, t, noise)
            first, x_start = slope(x, t)
            h = t_next - t
            if self.method == "euler" or index == self.num_steps - 1:
                x = x + h * first
            else:
                part = second.nodes[1]
                at = t_next if part == 1 else t + part * h
                ahead, _ = slope(x + (part * h) * first, at)
                x = x + h * (second.weights[0] * first + second.weights[1] * ahead)
            yield SampleStep(index, schedule.sigma(t), x, x_start)

    def _churned(
        self,
        process: EDM,
        schedule: SigmaSchedule,
        x: Tensor,
        t: float,
        noise: Callable[[], Tensor] | None,
    ) -> tuple[Tensor, float]:
        """Raise the noise level of a step with churn; the new state and its time."""
        sigma = schedule.sigma(t)
        if not self.S_churn or not self.S_min <= sigma <= self.S_max:
            return x, t
        assert noise is not None  # `trajectory` has checked it
        gamma = min(self.S_churn / self.num_steps, math.sqrt(2) - 1)
        t_hat = schedule.time(_rounded(process, sigma + gamma * sigma))
        sigma_hat = schedule.sigma(t_hat)
        scale, scale_hat = self._scale(sigma), self._scale(sigma_hat)
        # Rounding to a table may find a lower level.
        added = math.sqrt(max(sigma_hat**2 - sigma**2, 0))
        return (scale_hat / scale) * x + (added * scale_hat * self.S_noise) * noise(), t_hat


def _denoised(
    process: EDM, denoiser: Denoiser, x: Tensor, sigma: float, clip_denoised: bool
) -> Tensor:
    """D(x, sigma), the estimated image."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    times = torch.full((len(x),), sigma, dtype=dtype, device=x.device)
    prediction, _ = process.split_output(denoiser(x, times), x.shape[1])
    x_start = process.to_x_start(prediction, x, times)
    return x_start.clamp(-1, 1) if clip_denoised else x_start


def _rounded(process: EDM, sigma: float) -> float:
    """The nearest noise level that the network knows: iDDPM's networks have a table of them."""
    kind = process.preconditioning
    if not isinstance(kind, IDDPMPreconditioning):
        return sigma
    return float(kind.table[kind.index(torch.tensor([sigma], dtype=torch.float64))])
