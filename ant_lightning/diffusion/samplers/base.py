"""The base class of the samplers: a path of network calls from noise to an image."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from ant_lightning.diffusion.process import NoiseProcess, at_least_float32
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ant_lightning.diffusion.process import Images

Denoiser: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SampleStep:
    """Result of one step.

    Attributes:
        index: Number of the step on the path, from 0.
        timestep: Time of the step's first network call, in the process' own time: an integer for
            `DiscreteDiffusion`, in training's numbering whatever the spacing.
        x: The new state `[b, c, ...]`.
        x_start: The predicted image `[b, c, ...]`.
    """

    index: int
    timestep: float
    x: Tensor
    x_start: Tensor


_SAMPLERS = {
    "DiscreteDiffusion": "DDIM or DDPM",
    "FlowMatching": "ODESampler or SDESampler",
    "EDM": "EDMSampler",
}


def others_for(process: NoiseProcess) -> str:
    """The end of a message about a sampler that does not fit: those that do."""
    kinds = [kind.__name__ for kind in type(process).__mro__ if kind.__name__ in _SAMPLERS]
    return f"; take {_SAMPLERS[kinds[0]]}" if kinds else ""


class Sampler(ABC):
    """Base of the samplers: a path of network calls from `x_T` `[b, c, ...]` to an image.

    A subclass implements `num_calls`, `is_random` and `_steps`, and `path_length` if a step makes
    more than one network call.

    `num_steps` of a sampler counts its steps, never the points between them; `num_calls` counts
    network calls.

    `denoiser(x, t)` is given the state and times `[b]` in the process' own time (int64 in
    training's numbering whatever the spacing for `DiscreteDiffusion`, float64 for the others), puts
    `process.network_inputs` in front of the network, and returns the network's output.

    `noise()` returns standard normal values shaped like x. The caller seeds them per image, so that
    an image does not depend on its batch. A random sampler calls `noise()` once in each step that
    adds noise, in order; a deterministic one never calls it.

    Attributes:
        is_multistep: Whether a step depends on earlier network outputs besides the state.
        process_type: The kind of process that it can sample.

    Examples:
        >>> import torch
        >>> from ant_lightning import DDIM, DiscreteDiffusion, Sampler
        >>> sampler = DDIM(num_steps=10)
        >>> isinstance(sampler, Sampler)
        True
        >>> process, x_T = DiscreteDiffusion(), torch.zeros(1, 3, 4, 4)
        >>> steps = sampler.trajectory(process, lambda x, t: torch.zeros_like(x), x_T)
        >>> [step.timestep for step in steps]
        [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    """

    is_multistep: ClassVar[bool] = False
    process_type: ClassVar[type[NoiseProcess]] = NoiseProcess  # type: ignore[type-abstract]

    def __repr__(self) -> str:
        settings = {name: value for name, value in vars(self).items() if name[0] != "_"}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in settings.items())})"

    def brief(self) -> str:
        """Its number of steps and what else is not as by default: `ODESampler(num_steps=25)`."""
        chosen = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name, parameter.default)
            if value is None or (value == parameter.default and name != "num_steps"):
                continue
            plain = isinstance(value, str | int | float)
            chosen.append(f"{name}={value}" if plain else f"{name}={type(value).__name__}")
        return f"{type(self).__name__}({', '.join(chosen)})"

    @property
    @abstractmethod
    def is_random(self) -> bool:
        """Whether the steps use noise."""

    @abstractmethod
    def num_calls(self, process: Any) -> int | None:  # noqa: ANN401 - of `process_type`
        """Number of network calls on a whole path; `None` if the sampler decides on the way."""

    def path_length(self, process: Any) -> int:  # noqa: ANN401 - of `process_type`
        """Number of steps of a whole path."""
        return self.num_calls(process) or 0

    def check(self, process: NoiseProcess) -> None:
        """Check that this sampler can sample with the process.

        Raises:
            ConfigError: If it is for another kind of process, or its steps do not fit this one.
        """
        if not isinstance(process, self.process_type):
            raise ConfigError(
                f"sampler: must be one for {type(process).__name__}, found {type(self).__name__}, "
                f"which is for {self.process_type.__name__}{others_for(process)}"
            )
        self._check_path(process)

    def _check_path(self, process: Any) -> None:  # noqa: ANN401 - of `process_type`
        """Check that the steps fit the process."""
        self.path_length(process)

    @abstractmethod
    def _steps(
        self,
        process: Any,  # noqa: ANN401 - of `process_type`
        denoiser: Denoiser,
        x: Tensor,
        *,
        noise: Callable[[], Tensor] | None,
        clip_denoised: bool,
        first_step: int,
    ) -> Iterator[SampleStep]:
        """The steps of `trajectory`, which has checked the arguments."""

    def trajectory(
        self,
        process: NoiseProcess,
        denoiser: Denoiser,
        x_T: Images,
        *,
        noise: Callable[[], Tensor] | None = None,
        clip_denoised: bool = True,
        first_step: int = 0,
    ) -> Iterator[SampleStep]:
        """Make the steps one by one.

        Args:
            process: The process of training, not a respaced one: the sampler respaces it.
            denoiser: The network.
            x_T: Standard normal noise, or the state before `first_step`. Half precision is cast to
                float32.
            noise: Source of the noise.
            clip_denoised: Whether to clip each predicted `x_start` to [-1, 1]; not for latents.
            first_step: Index of the first step to make.

        Raises:
            ConfigError: If the sampler does not fit the process, `first_step` is not on the path,
                or a random sampler has no `noise`.
        """
        # Not a generator itself: the checks must raise here, not at the first step.
        self.check(process)
        length = self.path_length(process)
        if not 0 <= first_step < length:
            raise ConfigError(f"first_step: must be in [0, {length}), found {first_step}")
        if self.is_random and noise is None:
            raise ConfigError(f"noise: must be given to {type(self).__name__}, found None")
        return self._steps(
            process,
            denoiser,
            at_least_float32(x_T),
            noise=noise,
            clip_denoised=clip_denoised,
            first_step=first_step,
        )

    def sample(
        self,
        process: NoiseProcess,
        denoiser: Denoiser,
        x_T: Images,
        *,
        noise: Callable[[], Tensor] | None = None,
        clip_denoised: bool = True,
        first_step: int = 0,
        on_step: Callable[[SampleStep], object] | None = None,
    ) -> Images:
        """Run `trajectory` to its end without gradients; returns the last state.

        Args:
            process: As for `trajectory`, and so on.
            denoiser: The network.
            x_T: The noise.
            noise: Source of the noise.
            clip_denoised: Whether to clip each predicted `x_start`.
            first_step: Index of the first step to make.
            on_step: Called after each step, such as to show the progress.
        """
        steps = self.trajectory(
            process,
            denoiser,
            x_T,
            noise=noise,
            clip_denoised=clip_denoised,
            first_step=first_step,
        )
        with torch.no_grad():
            # One state at a time: a list of them would hold the whole path in memory.
            for last in steps:
                x_T = last.x
                if on_step is not None:
                    on_step(last)
        return x_T
