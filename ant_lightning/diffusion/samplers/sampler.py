"""The contract of every sampler: a path of network calls from noise to an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float

    from ant_lightning.diffusion.process import DiscreteDiffusion

__all__ = ["Denoiser", "SampleStep", "Sampler"]

Denoiser: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SampleStep:
    """What one iteration left: its place on the path, the timestep it denoised, the new state."""

    index: int
    timestep: int
    x: Tensor
    x_start: Tensor


class Sampler(ABC):
    """Base of the samplers: a path of network calls from x_T [b, c, ...] to an image.

    `denoiser(x, t)` gets the state and int64 [b] original timesteps (those of training, whatever
    the spacing), and gives the network's output. `noise()` gives standard normal values shaped
    like x; the caller keys them by image, so that an image does not depend on its batch. It is
    called once per iteration that is random, in order; a deterministic sampler never calls it.
    """

    def __repr__(self) -> str:
        settings = {name: value for name, value in vars(self).items() if name[0] != "_"}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in settings.items())})"

    @abstractmethod
    def num_calls(self, process: DiscreteDiffusion) -> int:
        """How many times a whole path calls the network."""

    @abstractmethod
    def trajectory(
        self,
        process: DiscreteDiffusion,
        denoiser: Denoiser,
        x_T: Float[Tensor, "b c ..."],
        *,
        noise: Callable[[], Tensor] | None = None,
        clip_denoised: bool = True,
        first_step: int = 0,
    ) -> Iterator[SampleStep]:
        """Give the state after every iteration.

        Args:
            process: of training, not respaced: the sampler chooses its timesteps itself.
            denoiser: the network.
            x_T: standard normal, or the state on entry if `first_step` is not 0. The state is
                kept in float32 at least.
            noise: source of the noise.
            clip_denoised: clip each predicted x_start to [-1, 1]; not for latents.
            first_step: the index of the first iteration to run.

        Raises:
            ConfigError: `first_step` is not on the path, or a random sampler got no `noise`.
        """

    def sample(
        self,
        process: DiscreteDiffusion,
        denoiser: Denoiser,
        x_T: Float[Tensor, "b c ..."],
        *,
        noise: Callable[[], Tensor] | None = None,
        clip_denoised: bool = True,
        first_step: int = 0,
    ) -> Float[Tensor, "b c ..."]:
        """Run `trajectory` to its end without gradients and give the last state."""
        x = x_T
        with torch.no_grad():
            for step in self.trajectory(
                process,
                denoiser,
                x_T,
                noise=noise,
                clip_denoised=clip_denoised,
                first_step=first_step,
            ):
                x = step.x
        return x

    def _check_first_step(self, first_step: int, process: DiscreteDiffusion) -> None:
        if not 0 <= first_step < self.num_calls(process):
            raise ConfigError(
                f"first_step must be in [0, {self.num_calls(process)}), found {first_step}"
            )
