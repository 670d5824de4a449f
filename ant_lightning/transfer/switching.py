"""Sampling that uses a specialist inside one interval of timesteps."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ant_lightning.data.batch import to_uint8
from ant_lightning.errors import ConfigError
from ant_lightning.generation.features import ImageFeatures

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from ant_lightning.diffusion.condition import Condition
    from ant_lightning.generation.extractor import FeatureExtractor
    from ant_lightning.models.denoiser import DiffusionModule


class SpecialistSampler:
    """Samples images of a module, and the same with a specialist inside one interval.

    A trajectory starts at the noisiest cell and goes down. With a specialist inside
    `[start, stop)`, the trajectory equals the module's own up to its first step that calls the
    network in a cell below `stop`. `sample` computes this shared part once and keeps the state at
    its end; `sample_with` goes on from there. Multistep solvers (of diffusers) depend on more than
    the state, so they start from noise.

    Args:
        module: The multi-task model.
        intervals: `[start, stop)` of each specialist, in cells.
        seed: Seed in place of the module's.

    Attributes:
        num_steps: Steps of a trajectory, once images were sampled.
        first_step: First step inside each interval, once images were sampled.
    """

    def __init__(
        self,
        module: DiffusionModule,
        intervals: Sequence[tuple[int, int]],
        *,
        seed: int | None = None,
    ) -> None:
        self.module = module
        self.intervals = intervals
        self.seed = seed
        self.num_steps = 0
        self.first_step: dict[tuple[int, int], int] = {}
        # State on the CPU and draws of noise so far, by interval and indices.
        self._states: dict[tuple[tuple[int, int], tuple[int, ...]], tuple[Tensor, int]] = {}

    @torch.no_grad()
    def sample(self, indices: Sequence[int]) -> Tensor:
        """The module's own images of these indices, as `module.sample` gives them.

        Raises:
            ConfigError: If the sampler has no call in an interval, or is adaptive: its calls have
                another time for each image.
        """
        module, process = self.module, self.module.process
        if module.sampler.num_calls(process) is None:
            raise ConfigError(
                "model.sampling.sampler: must have fixed times to switch between networks, found "
                f"the adaptive {module.sampler}"
            )
        noise, guided = module.image_noise(indices, seed=self.seed), module.guided(indices)
        x_T, num_draws, visited = noise(), 1, list[int]()
        # Number of steps, state and number of noise draws at the start of the present step, and
        # the same of the step in which each interval was entered.
        now = (0, x_T, 1)
        entered: dict[tuple[int, int], tuple[int, Tensor, int]] = {}
        only_the_state_matters = not module.sampler.is_multistep

        def next_noise() -> Tensor:
            nonlocal num_draws
            num_draws += 1
            return noise()

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            cell = int(process.cells_at(t[:1]))  # the whole batch is at one time
            for interval in self.intervals:
                if interval not in entered and cell < interval[1] and only_the_state_matters:
                    entered[interval] = (now[0], now[1].cpu(), now[2])
            visited.append(cell)
            return guided(x, t)

        x_start = x_T
        for step in module.sampler.trajectory(
            process, denoiser, x_T, noise=next_noise, clip_denoised=module.clip_denoised
        ):
            x_start = step.x
            now = (step.index + 1, step.x, num_draws)
        self.num_steps = now[0]
        for start, stop in self.intervals:
            if not any(start <= cell < stop for cell in visited):
                raise ConfigError(
                    f"model.sampling.sampler: must have a timestep in [{start}, {stop}), "
                    f"found none in the {now[0]} steps of {module.sampler}; take more steps"
                )
            # Nothing was kept for a multistep solver: it starts from the noise x_T, one draw.
            first, x, draws = entered.get((start, stop), (0, x_T.cpu(), 1))
            self.first_step[start, stop] = first
            self._states[(start, stop), tuple(indices)] = (x, draws)
        return module.decode(x_start)

    @torch.no_grad()
    def sample_with(
        self, specialist: nn.Module, interval: tuple[int, int], indices: Sequence[int]
    ) -> Tensor:
        """Images with a specialist inside the interval and the module's backbone outside.

        Args:
            specialist: A network like the backbone.
            interval: One of `intervals`.
            indices: Indices that `sample` was called with.
        """
        module, (start, stop) = self.module, interval
        x, num_draws = self._states[interval, tuple(indices)]
        noise = module.image_noise(indices, seed=self.seed)
        for _ in range(num_draws):  # skip the noise that the shared part used
            noise()

        def denoise(x_t: Tensor, times: Tensor, condition: Condition) -> Tensor:
            inside = start <= int(module.process.cells_at(times[:1])) < stop
            with using_network(module, specialist if inside else module.backbone):
                return module.denoise(x_t, times, condition)

        x_start = module.sampler.sample(
            module.process,
            module.guided(indices, denoise=denoise),
            x.to(module.device),
            noise=noise,
            clip_denoised=module.clip_denoised,
            first_step=self.first_step[interval],
        )
        return module.decode(x_start)

    def features(
        self,
        extractor: FeatureExtractor,
        batches: Iterable[Sequence[int]],
        specialist: tuple[nn.Module, tuple[int, int]] | None = None,
    ) -> Tensor:
        """Features `[n, d]` of the images of all ranks, in the order of their indices.

        Args:
            extractor: Extractor, on the module's device.
            batches: Indices of this rank's images: r, r + w, ... on rank r of w.
            specialist: A specialist and its interval; `None` for the module's own images.
        """
        images = ImageFeatures(extractor).to(self.module.device)
        for indices in batches:
            if specialist is None:
                images.update(to_uint8(self.sample(indices)))
            else:
                images.update(to_uint8(self.sample_with(*specialist, indices)))
        features = images.compute().features
        assert features is not None  # `ImageFeatures` keeps them unless told otherwise
        return features


@contextmanager
def using_network(module: DiffusionModule, network: nn.Module) -> Iterator[None]:
    """Replace the module's backbone for the duration of the context."""
    own = module.backbone
    module.backbone = network
    try:
        yield
    finally:
        module.backbone = own
