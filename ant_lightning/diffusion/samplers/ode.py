"""The probability-flow ODE of flow matching, by fixed steps or with control of the error."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ant_lightning.diffusion.flow import FlowMatching, FlowPath
from ant_lightning.diffusion.process import at_least_float32
from ant_lightning.diffusion.samplers.adaptive import AdaptiveMethod, solve_each
from ant_lightning.diffusion.samplers.base import Denoiser, Sampler, SampleStep
from ant_lightning.diffusion.samplers.flow_field import FlowField
from ant_lightning.diffusion.samplers.flow_times import (
    edm_times,
    even_times,
    sampling_interval,
    shifted,
)
from ant_lightning.diffusion.samplers.runge_kutta import ODEMethod, runge_kutta_step, tableau
from ant_lightning.errors import ConfigError, check_above, check_at_least, check_one_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ant_lightning.diffusion.process import Images

_ADAPTIVE = get_args(AdaptiveMethod)


class ODESampler(Sampler):
    """Solves `dx/dt = v(x, t)` of flow matching from noise (t = 1) to data (t = 0).

    `num_steps` counts steps, as everywhere in this package: n steps lie between n + 1 times. SiT
    counts the times, so its `num_steps` is ours plus 1. A step calls the network once with `euler`,
    twice with `heun`, `midpoint` and `ralston`, three times with `heun3`, four times with `rk4`.
    The error shrinks with the order of the method: 1 for `euler`, 2 for the next three, 3 and 4.

    An adaptive method chooses the steps for each image alone: an image does not depend on the
    others of its batch. A network may round otherwise in a batch of another size, which may choose
    other steps; the image then changes by less than the tolerance. It needs the extra `ode`
    (torchdiffeq).

    Args:
        num_steps: Steps of a fixed method; `None` for 50. An adaptive one takes none.
        method: A fixed method, or `dopri5`, `dopri8`, `bosh3`, `adaptive_heun`.
        grid: Times of a fixed method. `uniform`: evenly spaced. `edm`: EDM's noise levels on the
            linear path, which start at t = 80/81.
        shift: Resolution shift `t -> shift t / (1 + (shift - 1) t)` of a uniform grid.
        times: The times of a fixed method, decreasing, in place of `num_steps`, grid and shift.
        margin: What is left out of an end where the velocity is not finite; `None` for 0.001. See
            `sampling_interval`.
        path: Walk this path (`linear`, `gvp`, `vp`) in place of that of training. The exact flow
            ends at the same image, but a straighter path needs fewer steps.
        rtol: Relative tolerance of an adaptive method; `None` for 0.001.
        atol: Absolute tolerance of an adaptive method; `None` for 0.000001.

    Raises:
        ConfigError: If a setting is out of range, unknown, or one that the method does not take.

    Reference:
        Ma et al., "SiT", arXiv 2401.08740; Lipman et al., arXiv 2210.02747.

    Examples:
        >>> import torch
        >>> from ant_lightning import FlowMatching, ODESampler
        >>> def denoiser(x, t):  # SiT's velocity if all pixels of all images are 0.5
        ...     return (0.5 - x) / t.view(-1, 1, 1, 1).to(x)
        >>> x = torch.randn(2, 3, 4, 4)
        >>> images = ODESampler(4, method="euler").sample(FlowMatching(), denoiser, x)
        >>> images.shape, round(images.mean().item(), 3)
        (torch.Size([2, 3, 4, 4]), 0.5)
    """

    process_type = FlowMatching
    is_random = False

    def __init__(
        self,
        num_steps: int | None = None,
        *,
        method: ODEMethod | AdaptiveMethod = "heun",
        grid: Literal["uniform", "edm"] = "uniform",
        shift: float = 1.0,
        times: Sequence[float] | None = None,
        margin: float | None = None,
        path: FlowPath | None = None,
        rtol: float | None = None,
        atol: float | None = None,
    ) -> None:
        self.is_adaptive = method in _ADAPTIVE
        if self.is_adaptive:
            _check_unused(
                f"of the adaptive {method}, which chooses its steps by rtol and atol",
                num_steps=num_steps,
                times=times,
                grid=None if grid == "uniform" else grid,
                shift=None if shift == 1 else shift,
            )
        else:
            _check_unused(f"of {method}, whose steps are fixed", rtol=rtol, atol=atol)
            tableau(method)
        if times is not None:
            _check_unused("beside times", num_steps=num_steps)
            if len(times) < 2 or any(a <= b for a, b in pairwise(times)):
                raise ConfigError(f"times: must be two or more and decrease, found {list(times)}")
        check_one_of(("uniform", "edm"), grid=grid)
        if grid == "edm" and shift != 1:
            raise ConfigError(f"shift: must be 1 with grid 'edm', found {shift}")
        if path is not None:
            check_one_of(get_args(FlowPath), path=path)
        check_at_least(1, num_steps=num_steps)
        check_above(0, shift=shift, rtol=rtol, atol=atol)
        self.num_steps = num_steps
        self.method = method
        self.grid = grid
        self.shift = shift
        self.times = None if times is None else [float(t) for t in times]
        self.margin = margin
        self.path = path
        self.rtol = rtol
        self.atol = atol

    def path_times(self, process: FlowMatching) -> list[float]:
        """The times between the steps, decreasing; of an adaptive method the first and the last."""
        if self.times is not None:
            return self.times
        start, stop = sampling_interval(process, self.margin)
        walked = self._walked(process)
        if walked is not None:
            # Another path begins and ends where training's network does.
            ends = process.log_snr_at(torch.tensor([start, stop], dtype=torch.float64))
            first, last = walked.times_at(ends).tolist()
            start, stop = sampling_interval(walked, self.margin)
            start, stop = min(start, first), max(stop, last)
        if self.is_adaptive:
            return [start, stop]
        num_steps = self.num_steps or 50
        if self.grid == "edm":
            return edm_times(num_steps)
        return [shifted(t, self.shift) for t in even_times(start, stop, num_steps)]

    def _walked(self, process: FlowMatching) -> FlowMatching | None:
        if self.path in (None, process.path):
            return None
        return FlowMatching(self.path, prediction_type=process.prediction_type)

    def path_length(self, process: FlowMatching) -> int:
        """Number of steps; 1 for an adaptive method, whose inner steps are its own."""
        return len(self.path_times(process)) - 1

    def num_calls(self, process: FlowMatching) -> int | None:
        """Number of network calls on a whole path; `None` for an adaptive method."""
        if self.is_adaptive:
            return None
        return self.path_length(process) * len(tableau(self.method).nodes)

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
        field = FlowField(
            process, denoiser, walked=self._walked(process), clip_denoised=clip_denoised
        )
        times = self.path_times(process)
        if first_step == 0 and self.times is None:
            x = field.scale(times[0]) * x
        for index, (t, t_next) in list(enumerate(pairwise(times)))[first_step:]:
            x, x_start = self._step(field, x, t, t_next)
            yield SampleStep(index, t, x, x_start)

    def _step(self, field: FlowField, x: Tensor, t: float, t_next: float) -> tuple[Tensor, Tensor]:
        """The state at `t_next`, and the image predicted at `t`."""
        if self.is_adaptive:
            x = solve_each(
                lambda x, times: field.at(x, times).v,
                x,
                t,
                t_next,
                method=self.method,  # type: ignore[arg-type]
                rtol=self.rtol or 1e-3,
                atol=self.atol or 1e-6,
            )
            return x, x
        predicted: list[Tensor] = []

        def velocity(x: Tensor, t: float) -> Tensor:
            at = field.at(x, t)
            predicted.append(at.x_start)
            return at.v

        x = runge_kutta_step(velocity, x, t, t_next, tableau(self.method))
        return x, predicted[0]

    @torch.no_grad()
    def invert(
        self,
        process: FlowMatching,
        denoiser: Denoiser,
        x_start: Images,
        *,
        clip_denoised: bool = False,
    ) -> Images:
        """Find the noise from which sampling nearly returns to `x_start`, by the same times."""
        self.check(process)
        field = FlowField(
            process, denoiser, walked=self._walked(process), clip_denoised=clip_denoised
        )
        times = self.path_times(process)
        x = at_least_float32(x_start)
        for t, t_next in pairwise(times[::-1]):
            x, _ = self._step(field, x, t, t_next)
        return x if self.times is not None else x / field.scale(times[0])


def _check_unused(where: str, **values: object) -> None:
    for name, value in values.items():
        if value is not None:
            raise ConfigError(
                f"{name}: must be left out {where}, found {value}; None or null leaves it out"
            )
