"""What DDPM and DDIM share: choosing timesteps, and walking down a respaced process."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ant_lightning.diffusion.samplers.respacing import latent_ddim_timesteps, space_timesteps
from ant_lightning.diffusion.samplers.sampler import Denoiser, Sampler, SampleStep
from ant_lightning.diffusion.tables import at_least_float32
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Float

    from ant_lightning.diffusion.process import DiscreteDiffusion, PMeanVariance

__all__ = ["TableSampler", "denoise_at"]


class TableSampler(Sampler):
    """A sampler that steps down a respaced process."""

    def __init__(self, *, num_steps: int, spacing: str, spacings: tuple[str, ...]) -> None:
        name = type(self).__name__
        if num_steps < 1:
            raise ConfigError(f"{name}: num_steps must be at least 1, found {num_steps}")
        if spacing not in spacings:
            raise ConfigError(
                f"{name}: spacing must be one of {', '.join(spacings)}, found {spacing}"
            )
        self.num_steps = num_steps
        self.spacing = spacing

    def respaced(self, process: DiscreteDiffusion) -> DiscreteDiffusion:
        """The process on the timesteps of the path (built once per process)."""
        total = process.num_timesteps
        if self.num_steps > total:
            raise ConfigError(
                f"num_steps must not exceed the process' {total} timesteps, found {self.num_steps}"
            )
        if self._stops_at_zero:
            quadratic = self.spacing == "ldm_quadratic"
            path = latent_ddim_timesteps(total, self.num_steps, quadratic=quadratic)
            return process.respace([0, *path])
        counts = f"ddim{self.num_steps}" if self.spacing == "ddim" else [self.num_steps]
        return process.respace(space_timesteps(total, counts))

    @property
    def _stops_at_zero(self) -> bool:
        # Latent diffusion stops at timestep 0 without denoising it: its last step leads to
        # abar_0, not to 1. So 0 is on the table, but no step starts there.
        return self.spacing in {"ldm", "ldm_quadratic"}

    def num_calls(self, process: DiscreteDiffusion) -> int:
        """How many times a whole path calls the network."""
        return self.respaced(process).num_timesteps - self._stops_at_zero

    @property
    @abstractmethod
    def _is_random(self) -> bool: ...

    @abstractmethod
    def _step(
        self, process: DiscreteDiffusion, model: PMeanVariance, t: Tensor, noise: Tensor | None
    ) -> Tensor: ...

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
        """Give the state after every iteration; see the base class."""
        self._check_first_step(first_step, process)
        if self._is_random and noise is None:
            raise ConfigError(f"{type(self).__name__} is random: noise must be given, found None")
        # Checked here, and not in the generator: an error belongs to the call, not to next().
        return self._iterate(
            self.respaced(process), denoiser, x_T, noise, clip_denoised, first_step
        )

    def _iterate(
        self,
        process: DiscreteDiffusion,
        denoiser: Denoiser,
        x: Tensor,
        noise: Callable[[], Tensor] | None,
        clip_denoised: bool,
        first_step: int,
    ) -> Iterator[SampleStep]:
        x = x.to(at_least_float32(x))
        path = list(range(process.num_timesteps - 1, self._stops_at_zero - 1, -1))
        for index in range(first_step, len(path)):
            model, t = denoise_at(process, denoiser, x, path[index], clip_denoised)
            # The step from timestep 0 adds no noise, so none is drawn for it.
            draws = self._is_random and path[index] > 0
            x = self._step(process, model, t, noise() if draws and noise is not None else None)
            yield SampleStep(index, int(process.timestep_map[path[index]]), x, model.x_start)


def denoise_at(
    process: DiscreteDiffusion, denoiser: Denoiser, x: Tensor, step: int, clip_denoised: bool
) -> tuple[PMeanVariance, Tensor]:
    """Call the network at one timestep of a respaced process; also gives that timestep, [b]."""
    t = torch.full((len(x),), step, dtype=torch.int64, device=x.device)
    output = denoiser(x, torch.full_like(t, int(process.timestep_map[step])))
    return process.p_mean_variance(output, x, t, clip_denoised=clip_denoised), t
