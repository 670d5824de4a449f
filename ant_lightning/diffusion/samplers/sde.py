"""Stochastic sampling of flow matching, with the diffusion coefficients and last steps of SiT."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ant_lightning.diffusion.flow import FlowMatching
from ant_lightning.diffusion.samplers.base import Denoiser, Sampler, SampleStep
from ant_lightning.diffusion.samplers.flow_field import FlowField, FlowPrediction
from ant_lightning.diffusion.samplers.flow_times import even_times, sampling_interval
from ant_lightning.errors import ConfigError, check_at_least, check_between, check_one_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Diffusion: TypeAlias = Literal[
    "constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"
]
LastStep: TypeAlias = Literal["mean", "tweedie", "euler"]


def diffusion_coefficient(
    process: FlowMatching, diffusion: Diffusion, t: float, norm: float = 1.0
) -> tuple[float, float]:
    """The coefficient `w(t)` of the reverse SDE, and `w(t) / s(t)`, at our time t (1 is noise).

    | name | w |
    |---|---|
    | `constant` | `norm` |
    | `sbdm` | `norm s (a s' - s a') / a`, the noise of the forward process |
    | `sigma` | `norm s` |
    | `linear` | `norm t` |
    | `decreasing` | `(1 - norm cos(pi t))² / 4` |
    | `increasing_decreasing` | `norm sin²(pi t)` |

    Where `s = 0`, `w / s` is that of `sbdm` and `sigma` exactly, and infinite for the others.

    Reference:
        Ma et al., "SiT", appendix A, arXiv 2401.08740 (its t is 1 - t, and `w` is half its w(t)).

    Examples:
        >>> from ant_lightning import FlowMatching
        >>> from ant_lightning.diffusion.samplers.sde import diffusion_coefficient
        >>> diffusion_coefficient(FlowMatching(), "sigma", 0.25)  # s = t on the linear path
        (0.25, 1.0)
    """
    time = torch.tensor([t], dtype=torch.float64)
    a, s, _, _, det = (float(each) for each in process.levels(time, time))
    if diffusion == "sigma":
        return norm * s, norm
    if diffusion == "sbdm":
        ratio = norm * det / a if a > 1e-12 else math.inf  # cos(pi / 2) is not quite 0
        return ratio * s, ratio
    w = {
        "constant": norm,
        "linear": norm * t,
        "decreasing": 0.25 * (1 - norm * math.cos(math.pi * t)) ** 2,
        "increasing_decreasing": norm * math.sin(math.pi * t) ** 2,
    }[diffusion]
    return w, w / s if s > 0 else math.inf


class SDESampler(Sampler):
    """Solves the reverse SDE of flow matching, from noise (t = 1) to data (t = 0).

    A step from t to `t - h` is `x + h (w score - v) + sqrt(2 w h) noise` with the velocity v and
    the score `-eps / s`; any `w(t) >= 0` has the same marginal distributions. `heun` adds the noise
    first and then makes a Heun step of the rest.

    `num_steps` counts steps, the last one with it: SiT's `num_steps`, and that minus 1 without a
    last step.

    Args:
        num_steps: Steps of a path.
        method: `euler` (Euler-Maruyama) or `heun`, which calls the network twice.
        diffusion: How `w` depends on time; see `diffusion_coefficient`. `sbdm` is infinite at pure
            noise on the linear and GVP paths, and is refused where a path begins there.
        diffusion_norm: `norm` of the coefficient.
        last_step: The step to the data, without noise: `mean` is a step of the SDE without its
            noise, `euler` one of the ODE, `tweedie` the predicted image; `None` for no such step.
        last_step_size: Its size, the time at which the other steps end.
        margin: What is left out of an end where the velocity is not finite; see `ODESampler`.

    Raises:
        ConfigError: If a setting is out of range or unknown. When sampling starts: if `w` or
            `w score` is not finite on the path.

    Reference:
        Ma et al., "SiT", section 2.4 and appendix A, arXiv 2401.08740.

    Examples:
        >>> import torch
        >>> from ant_lightning import FlowMatching, SDESampler
        >>> def denoiser(x, t):  # SiT's velocity if all pixels of all images are 0.5
        ...     return (0.5 - x) / t.view(-1, 1, 1, 1).to(x)
        >>> noise = lambda: torch.randn(2, 3, 4, 4)
        >>> sampler = SDESampler(20, last_step="tweedie")
        >>> images = sampler.sample(FlowMatching(), denoiser, noise(), noise=noise)
        >>> images.shape, round(images.mean().item(), 3)
        (torch.Size([2, 3, 4, 4]), 0.5)
    """

    process_type = FlowMatching
    is_random = True

    def __init__(
        self,
        num_steps: int = 250,
        *,
        method: Literal["euler", "heun"] = "euler",
        diffusion: Diffusion = "sigma",
        diffusion_norm: float = 1.0,
        last_step: LastStep | None = "mean",
        last_step_size: float = 0.04,
        margin: float | None = None,
    ) -> None:
        check_at_least(1 if last_step is None else 2, num_steps=num_steps)
        check_at_least(0, diffusion_norm=diffusion_norm)
        check_one_of(("euler", "heun"), method=method)
        check_one_of(get_args(Diffusion), diffusion=diffusion)
        check_one_of((*get_args(LastStep), None), last_step=last_step)
        check_between(0, 1, last_step_size=last_step_size)
        self.num_steps = num_steps
        self.method = method
        self.diffusion: Diffusion = diffusion
        self.diffusion_norm = diffusion_norm
        self.last_step = last_step
        self.last_step_size = last_step_size
        self.margin = margin

    def path_times(self, process: FlowMatching) -> list[float]:
        """The times between the steps of the SDE, decreasing, without the last step."""
        start, stop = sampling_interval(process, self.margin)
        if self.last_step is None:
            return even_times(start, stop, self.num_steps)
        return even_times(start, self.last_step_size, self.num_steps - 1)

    def _check_path(self, process: FlowMatching) -> None:
        times = self.path_times(process)
        called = times if self.method == "heun" or self.last_step == "mean" else times[:-1]
        for t in called:
            if not all(map(math.isfinite, self._coefficient(process, t))):
                raise ConfigError(
                    f"diffusion: must be finite at t = {t:g}, where this path of {process.path} "
                    f"calls the network, found {self.diffusion}; 'sigma' is, and a margin cuts ends"
                )

    def num_calls(self, process: FlowMatching) -> int:
        """Number of network calls on a whole path."""
        num_sde = len(self.path_times(process)) - 1
        last = int(self.last_step is not None)
        return num_sde * (2 if self.method == "heun" else 1) + last

    def path_length(self, process: FlowMatching) -> int:
        """Number of steps of a whole path."""
        return self.num_steps

    def _coefficient(self, process: FlowMatching, t: float) -> tuple[float, float]:
        return diffusion_coefficient(process, self.diffusion, t, self.diffusion_norm)

    def _steps(
        self,
        process: FlowMatching,
        denoiser: Denoiser,
        x: Tensor,
        *,
        noise: Callable[[], Tensor] | None,
        clip_denoised: bool,
        first_step: int,
    ) -> Iterator[SampleStep]:
        assert noise is not None  # `trajectory` has checked it
        field = FlowField(process, denoiser, clip_denoised=clip_denoised)
        times = self.path_times(process)
        for index, (t, t_next) in list(enumerate(pairwise(times)))[first_step:]:
            h, (w, _) = t - t_next, self._coefficient(process, t)
            drawn = math.sqrt(2 * w * h) * noise()
            if self.method == "euler":
                at = field.at(x, t)
                x = x + h * self._drift(process, at, t) + drawn
            else:
                x = x + drawn
                at = field.at(x, t)
                slope = self._drift(process, at, t)
                ahead = field.at(x + h * slope, t_next)
                x = x + 0.5 * h * (slope + self._drift(process, ahead, t_next))
            yield SampleStep(index, t, x, at.x_start)
        if self.last_step is not None:
            at, h = field.at(x, times[-1]), self.last_step_size
            if self.last_step == "tweedie":
                x = at.x_start
            elif self.last_step == "euler":
                x = x - h * at.v
            else:
                x = x + h * self._drift(process, at, times[-1])
            yield SampleStep(self.num_steps - 1, times[-1], x, at.x_start)

    def _drift(self, process: FlowMatching, at: FlowPrediction, t: float) -> Tensor:
        """`w score - v`, towards the data; `w score = -(w / s) eps` is finite also where s is 0."""
        _, ratio = self._coefficient(process, t)
        return -at.v - ratio * at.eps
