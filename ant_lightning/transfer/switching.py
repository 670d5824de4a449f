"""Sampling with another network inside one interval of timesteps, from where it begins."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ant_lightning.diffusion.samplers.table_sampler import TableSampler
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from ant_lightning.models.denoiser import DiffusionModule

__all__ = ["Entry", "sample_and_mark", "sample_switched", "using_network"]


@dataclass(frozen=True)
class Entry:
    """A batch's state when its trajectory enters an interval.

    Attributes:
        step: Denoising steps made before.
        num_steps: Steps of the whole trajectory.
        x: The state `[b, c, h, w]`, on the CPU.
        num_draws: Draws of noise made before, that of `x_T` counted.
    """

    step: int
    num_steps: int
    x: Tensor
    num_draws: int


@torch.no_grad()
def sample_and_mark(
    module: DiffusionModule,
    indices: Sequence[int],
    intervals: Sequence[tuple[int, int]],
    *,
    seed: int | None = None,
) -> tuple[Tensor, list[Entry]]:
    """Draw the images of these indices, and keep the state on entering each interval.

    A trajectory goes from `T - 1` down, so one that switches networks inside `[start, stop)` is
    this one until its first timestep below `stop`: it can start from there. Samplers that
    remember more than the state (multistep solvers of diffusers) start from noise.

    Args:
        module: The multi-task model with the weights to be measured.
        indices: Which images.
        intervals: `[start, stop)` each.
        seed: In place of the module's.

    Returns:
        Images as `module.sample` gives them, and an entry for each interval.

    Raises:
        ConfigError: If the sampler visits no timestep of an interval.
    """
    noise = module.image_noise(indices, seed=seed)
    guided = module.guided(indices)
    num_draws, visited = 0, list[int]()
    marks: dict[int, tuple[int, Tensor, int]] = {}
    only_the_state_matters = isinstance(module.sampler, TableSampler)

    def drawn() -> Tensor:
        nonlocal num_draws
        num_draws += 1
        return noise()

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        timestep = int(t[0])
        for i, (_, stop) in enumerate(intervals):
            if i not in marks and timestep < stop and only_the_state_matters:
                marks[i] = (len(visited), x.cpu(), num_draws)
        visited.append(timestep)
        return guided(x, t)

    x_T = drawn()
    x_start = module.sampler.sample(
        module.process, denoiser, x_T, noise=drawn, clip_denoised=module.clip_denoised
    )
    for start, stop in intervals:
        if not any(start <= timestep < stop for timestep in visited):
            raise ConfigError(
                f"sampling.sampler: must visit a timestep of the interval [{start}, {stop}), found "
                f"none in the {len(visited)} steps of {module.sampler}; take more steps"
            )
    from_noise = (0, x_T.cpu(), 1)
    entries = [
        Entry(step, len(visited), x, draws)
        for step, x, draws in (marks.get(i, from_noise) for i in range(len(intervals)))
    ]
    return module.decode(x_start), entries


@torch.no_grad()
def sample_switched(
    module: DiffusionModule,
    network: nn.Module,
    interval: tuple[int, int],
    entry: Entry,
    indices: Sequence[int],
    *,
    seed: int | None = None,
) -> Tensor:
    """Draw images with `network` inside the interval and the module's own backbone outside.

    Args:
        module: As for `sample_and_mark`.
        network: Of the same form as the backbone.
        interval: `[start, stop)`.
        entry: What `sample_and_mark` kept of this interval and these indices.
        indices: Which images.
        seed: In place of the module's.
    """
    start, stop = interval
    noise = module.image_noise(indices, seed=seed)
    for _ in range(entry.num_draws):  # those that the prefix used
        noise()

    def denoise(x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        inside = start <= int(timesteps[0]) < stop
        with using_network(module, network if inside else module.backbone):
            return module.denoise(x_t, timesteps, labels)

    x_start = module.sampler.sample(
        module.process,
        module.guided(indices, denoise=denoise),
        entry.x.to(module.device),
        noise=noise,
        clip_denoised=module.clip_denoised,
        first_step=entry.step,
    )
    return module.decode(x_start)


@contextmanager
def using_network(module: DiffusionModule, network: nn.Module) -> Iterator[None]:
    """Inside, `network` is the module's backbone."""
    own = module.backbone
    module.backbone = network
    try:
        yield
    finally:
        module.backbone = own
