"""The loss of a module on images, timesteps and noise that are fixed by a key, for measuring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.data.batch import Batch
from ant_lightning.errors import ConfigError
from ant_lightning.models.denoiser import Draws
from ant_lightning.models.draws import step_noise
from ant_lightning.models.scaling import gradient_scaler, loss_scale
from ant_lightning.randomness import keyed_generator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ant_lightning.data.loader import ImageDataset
    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["LossProbe"]


class LossProbe:
    """Training losses of a module, the same value at every call with the same arguments.

    Images come without augmentation, with their own labels (no class dropout). Every rank loads
    what it asks for itself, so that a value does not depend on the rank.

    Args:
        pl_module: The module, attached to a trainer.
        dataset: Where images are from.
        num_images: Images of one value, at least 2; more than there are repeats them with other
            noise.
        batch_size: Most images in one forward pass.
        seed: Of images and noise.

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
        if min(len(dataset), num_images) < 2:
            raise ConfigError(
                "num_images: two disjoint halves need at least 2 images, found "
                f"{min(len(dataset), num_images)}"
            )
        self._module = pl_module
        self._dataset = dataset
        self._num_images = num_images
        self._batch_size = batch_size
        self._seed = seed
        order = torch.randperm(len(dataset), generator=keyed_generator(seed, "probe halves"))
        middle = len(order) // 2
        self._halves = (order[:middle], order[middle:])

    def at_timestep(self, timestep: int, half: int) -> Iterator[Tensor]:
        """Terms that sum to the mean loss at a timestep over images of one half, 0 or 1.

        The two halves of the data set are disjoint; timesteps draw their images and their noise
        independently of each other, since what they share would look like affinity.
        """
        num = self._num_images // 2
        indices = self._draw(self._halves[half], num, "probe images", timestep, half)
        timesteps = torch.full((num,), timestep)
        for losses in self._losses(indices, timesteps, f"probe half {half}", timestep):
            yield losses.sum() / num

    def of_task(self, task: int) -> Tensor:
        """The mean loss over a task's timesteps, a scalar."""
        num = self._num_images
        start, stop = self._module.clusters.boundaries[task : task + 2]
        generator = keyed_generator(self._seed, "probe timesteps", task)
        timesteps = torch.randint(start, stop, (num,), generator=generator)
        indices = self._draw(torch.arange(len(self._dataset)), num, "probe images of task", task)
        parts = self._losses(indices, timesteps, "probe task", task)
        return torch.stack([losses.sum() for losses in parts]).sum() / num

    def _draw(self, pool: Tensor, num: int, stream: str, *keys: int) -> list[int]:
        """`num` images of a pool, none twice before all were taken."""
        generator = keyed_generator(self._seed, stream, *keys)
        rounds = [
            torch.randperm(len(pool), generator=generator) for _ in range(-(-num // len(pool)))
        ]
        indices: list[int] = pool[torch.cat(rounds)[:num]].tolist()
        return indices

    def _losses(
        self, indices: list[int], timesteps: Tensor, stream: str, key: int
    ) -> Iterator[Tensor]:
        """Losses `[b]` of one batch after the other."""
        module, device = self._module, self._module.device
        trainer = module.trainer
        scale = loss_scale(gradient_scaler(trainer), device)
        for first in range(0, len(indices), self._batch_size):
            part = slice(first, min(first + self._batch_size, len(indices)))
            loaded = self._dataset.load(indices[part], epoch=None)
            batch = Batch(loaded.images.to(device), loaded.labels.to(device), loaded.indices)
            steps = timesteps[part]
            with trainer.precision_plugin.forward_context():
                with torch.no_grad():
                    x_start = module.encode(batch)
                draws = Draws(
                    steps.to(device),
                    module.clusters.task_of(steps),
                    step_noise(part, module.image_shape, self._seed, key, device, stream=stream),
                    batch.labels if module.num_classes else None,
                )
                losses = module.losses(x_start, draws)(torch.arange(len(steps), device=device))
            yield losses * scale
