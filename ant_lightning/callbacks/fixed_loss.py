"""The loss of a module on fixed images, timesteps and noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.diffusion.condition import map_condition
from ant_lightning.errors import ConfigError
from ant_lightning.models.draws import Draws, on_device, step_noise
from ant_lightning.models.loss_scaling import gradient_scaler, loss_scale
from ant_lightning.randomness import GOLDEN_RATIO, ImageNoise, keyed_generator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from ant_lightning.data.dataset import ImageDataset
    from ant_lightning.models.module import MultiTaskDiffusion
    from ant_lightning.tasks.clusters import TimestepClusters


class FixedLoss:
    """The loss of a module on draws that a seed determines.

    For given weights and arguments the values are the same at every call and on every rank. Images
    are loaded without augmentation, with their own labels (no class dropout).

    Args:
        pl_module: The module, attached to a trainer.
        dataset: Images to draw from.
        num_images: Images of one value, at least 2. If the data set has fewer, its images repeat
            with other noise.
        batch_size: Most images in one forward pass.
        seed: Seed of images and noise.

    Raises:
        ConfigError: If there are fewer than 2 images.
    """

    def __init__(
        self,
        pl_module: MultiTaskDiffusion,
        dataset: ImageDataset,
        *,
        num_images: int,
        batch_size: int,
        seed: int,
    ) -> None:
        if len(dataset) < 2:
            raise ConfigError(
                f"data: must have at least 2 images, for two disjoint halves, found {len(dataset)}"
            )
        self._module = pl_module
        self._dataset = dataset
        self._num_images = num_images
        self._batch_size = batch_size
        self._seed = seed
        # The names of the random streams are part of the values: changing one changes results.
        order = torch.randperm(len(dataset), generator=keyed_generator(seed, "probe halves"))
        self._halves = order.tensor_split([len(order) // 2])

    def at_timestep(self, timestep: int, half: int) -> Iterator[Tensor]:
        """Terms that sum to the mean loss at a timestep over images of one half, 0 or 1.

        The halves of the data set are disjoint. Each timestep draws its own images and noise:
        shared ones would look like affinity.
        """
        num = self._num_images // 2  # of each half
        indices = self._images(self._halves[half], num, "probe images", timestep, half)
        timesteps = torch.full((num,), timestep)
        noise = self._noise(f"probe half {half}", timestep)
        for losses, _ in self._losses(indices, timesteps, noise):
            yield losses.sum() / num

    def of_task(self, task: int) -> Tensor:
        """The mean loss over a task's timesteps as training draws them, a scalar."""
        return self.in_cells(*self._module.clusters.boundaries[task : task + 2], key=task)

    def in_cells(self, start: int, stop: int, *, key: int) -> Tensor:
        """The mean loss over the timesteps of `[start, stop)`, on the draws of this key."""
        num, task = self._num_images, key
        generator = keyed_generator(self._seed, "probe timesteps", task)
        density = self._module.draws.density
        if density is None:
            timesteps = torch.randint(start, stop, (num,), generator=generator)
        else:
            drawn = torch.multinomial(density[start:stop], num, True, generator=generator)
            timesteps = start + drawn
        everything = torch.arange(len(self._dataset))
        indices = self._images(everything, num, "probe images of task", task)
        losses = self._losses(indices, timesteps, self._noise("probe task", task))
        return torch.stack([each.sum() for each, _ in losses]).sum() / num

    def batch(
        self, num_images: int, clusters: TimestepClusters
    ) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """One batch as a training step has it: its losses by rows, and the tasks `[b]`.

        The timesteps are drawn by cluster.
        """
        generator = keyed_generator(self._seed, "probe batch")
        timesteps, tasks = clusters.sample(num_images, generator=generator)
        everything = torch.arange(len(self._dataset))
        indices = self._images(everything, num_images, "probe batch")
        noise = self._noise("probe batch", 0)(slice(0, num_images))
        x_start, draws = self._drawn(indices, timesteps, tasks, noise)
        losses = self._module.losses(x_start, draws)

        def of_rows(rows: Tensor) -> Tensor:
            with self._module.trainer.precision_plugin.forward_context():
                return losses(rows.to(self._module.device))[0]

        return of_rows, tasks

    @torch.no_grad()
    def in_interval(self, start: int, stop: int, *, num_draws: int) -> Tensor:
        """Unweighted loss of each of the first images, averaged over timesteps of `[start, stop)`.

        Image i has `num_draws` equidistant timesteps. Their offsets are a golden-ratio sequence
        over the images, so that all timesteps together cover the interval evenly. Timesteps and
        noise depend only on seed, image and draw (common random numbers), so that the noise common
        to two models cancels in their difference. Ranks share the images.

        Returns:
            `[num_images]`, float64 on the CPU, the same on every rank.
        """
        module, trainer = self._module, self._module.trainer
        own = torch.arange(trainer.global_rank, self._num_images, trainer.world_size)
        images, draws = own.repeat_interleave(num_draws), torch.arange(num_draws).repeat(len(own))
        # In [0, 1): from the golden-ratio offset of the image, `num_draws` equal steps.
        position = (images.double() * GOLDEN_RATIO + draws.double() / num_draws) % 1
        timesteps = start + (position * (stop - start)).long().clamp(max=stop - start - 1)
        keys = (images * num_draws + draws).tolist()

        def noise(part: slice) -> Tensor:
            stream, shape, device = "negative transfer", module.image_shape, module.device
            draw = ImageNoise(
                keys[part], shape=shape, seed=self._seed, stream=stream, device=device
            )
            return draw()

        batches = self._losses(images.tolist(), timesteps, noise)
        mse = torch.cat([errors.cpu().double() for _, errors in batches])
        losses = torch.zeros(self._num_images, dtype=torch.float64)
        losses[own] = mse.view(-1, num_draws).mean(1)
        if trainer.world_size > 1:  # the losses of other ranks are 0 here
            losses = trainer.strategy.reduce(losses.to(module.device), reduce_op="sum").cpu()
        return losses

    def _images(self, pool: Tensor, num: int, stream: str, *keys: int) -> list[int]:
        """Indices of `num` images of a pool; none repeats before all were drawn once."""
        generator = keyed_generator(self._seed, stream, *keys)
        rounds = -(-num // len(pool))
        order = torch.cat([torch.randperm(len(pool), generator=generator) for _ in range(rounds)])
        indices: list[int] = pool[order[:num]].tolist()
        return indices

    @property
    def scale(self) -> Tensor | float:
        """What `of_task` and its kin are multiplied by: the scale of mixed precision, or 1."""
        return loss_scale(gradient_scaler(self._module.trainer), self._module.device)

    def _noise(self, stream: str, key: int) -> Callable[[slice], Tensor]:
        """Noise of a slice of the images of one value."""
        shape, device = self._module.image_shape, self._module.device
        return lambda part: step_noise(part, shape, self._seed, key, device, stream=stream)

    def _losses(
        self, indices: list[int], timesteps: Tensor, noise: Callable[[slice], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Losses of images with given timesteps `[n]` and noise, one batch after another.

        Yields:
            The training loss `[b]`, times the scale of mixed precision, and the mean squared
            error `[b]` without any weight.
        """
        module, device = self._module, self._module.device
        scale = self.scale
        for first in range(0, len(indices), self._batch_size):
            part = slice(first, min(first + self._batch_size, len(indices)))
            steps = timesteps[part]
            with module.trainer.precision_plugin.forward_context():
                x_start, draws = self._drawn(
                    indices[part], steps, module.clusters.task_of(steps), noise(part)
                )
                losses = module.losses(x_start, draws)
                weighted, mse = losses(torch.arange(len(steps), device=device))
            yield weighted * scale, mse

    def _drawn(
        self, indices: list[int], timesteps: Tensor, tasks: Tensor, noise: Tensor
    ) -> tuple[Tensor, Draws]:
        """Clean images or latents with these indices, and the draws of a step on them."""
        module, device = self._module, self._module.device
        loaded = self._dataset.load(indices, epoch=None)
        batch = loaded._replace(images=loaded.images.to(device), labels=loaded.labels.to(device))
        with torch.no_grad():  # gradients are those of the backbone, not the first stage
            x_start = module.encode(batch)
        draws = Draws(
            timesteps.to(device),
            on_device(module.process.times(timesteps), device),
            tasks,
            noise,
            map_condition(lambda each: each.to(device), module.conditions.of_batch(batch)),
        )
        return x_start, draws
