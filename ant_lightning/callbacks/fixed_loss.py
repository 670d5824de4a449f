"""Losses of a module on fixed images, timesteps and noise, and the base of callbacks that use them.

The values depend on the weights alone: they are the same at every call with the same arguments,
and on every rank. Images come without augmentation, with their own labels (no class dropout).
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

from ant_lightning.callbacks.base import RunCallback, callback_of
from ant_lightning.callbacks.ema import EMA, averaged_weights
from ant_lightning.data.batch import Batch
from ant_lightning.data.module import needed_image_data
from ant_lightning.errors import ConfigError, check_at_least
from ant_lightning.models.draws import Draws, step_noise
from ant_lightning.models.optimizers import gradient_scaler, loss_scale
from ant_lightning.randomness import keyed_generator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import lightning as L
    from torch import Tensor

    from ant_lightning.data.dataset import ImageDataset
    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["FixedLoss", "MeasuringCallback", "batched_losses", "measurement_bar"]


class MeasuringCallback(RunCallback):
    """Base of callbacks that measure a module's loss, or its gradients, on fixed draws.

    Args:
        num_images: Images of one value, at least 2.
        batch_size: Most images in one forward pass.
        images: Images to measure on: those that are trained on (`train`), or `held_out`.
        weights: Weights to measure: `ema` or `live`.
        seed: Seed of images and noise; by default that of the module.
        every_n_epochs: Validations of `fit` between two measurements.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    def __init__(
        self,
        *,
        num_images: int,
        batch_size: int,
        images: Literal["train", "held_out"],
        weights: Literal["ema", "live"],
        seed: int | None,
        every_n_epochs: int = 1,
    ) -> None:
        check_at_least(2, num_images=num_images)
        check_at_least(1, batch_size=batch_size, every_n_epochs=every_n_epochs)
        if images not in ("train", "held_out"):
            raise ConfigError(f"images: must be train or held_out, found {images}")
        if weights not in ("ema", "live"):
            raise ConfigError(f"weights: must be ema or live, found {weights}")
        super().__init__()
        self.num_images = num_images
        self.batch_size = batch_size
        self.images = images
        self.weights = weights
        self.seed = seed
        self.every_n_epochs = every_n_epochs

    def is_due(self, trainer: L.Trainer) -> bool:
        """Whether the validation that ends now is one to measure at."""
        fitting = trainer.state.fn == "fit"
        due = not fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return due and not trainer.sanity_checking

    def seed_of(self, pl_module: MultiTaskDiffusion) -> int:
        """Seed of images and noise."""
        return pl_module.seed if self.seed is None else self.seed

    @contextmanager
    def fixed_loss(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> Iterator[FixedLoss]:
        """The loss, with the backbone in evaluation mode and with the weights to measure."""
        data = needed_image_data(trainer, type(self).__name__)
        loss = FixedLoss(
            pl_module,
            data.train_images if self.images == "train" else data.held_out_images,
            num_images=self.num_images,
            batch_size=self.batch_size,
            seed=self.seed_of(pl_module),
        )
        # In `fit` the backbone has the live weights, in a validation the averages.
        ema = callback_of(trainer, EMA)
        live = nullcontext() if ema is None else ema.live(pl_module)
        training = pl_module.backbone.training
        with averaged_weights(trainer, pl_module) if self.weights == "ema" else live:
            pl_module.backbone.eval()
            try:
                yield loss
            finally:
                pl_module.backbone.train(training)


class FixedLoss:
    """The training loss of a module on draws that a seed determines.

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
                f"num_images: two disjoint halves need 2 images or more, found {len(dataset)}"
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
        what timesteps share would look like affinity.
        """
        num = self._num_images // 2  # of each half
        indices = self._images(self._halves[half], num, "probe images", timestep, half)
        timesteps = torch.full((num,), timestep)
        for losses in self._losses(indices, timesteps, f"probe half {half}", timestep):
            yield losses.sum() / num

    def of_task(self, task: int) -> Tensor:
        """The mean loss over a task's timesteps, a scalar."""
        num = self._num_images
        start, stop = self._module.clusters.boundaries[task : task + 2]
        generator = keyed_generator(self._seed, "probe timesteps", task)
        timesteps = torch.randint(start, stop, (num,), generator=generator)
        everything = torch.arange(len(self._dataset))
        indices = self._images(everything, num, "probe images of task", task)
        losses = self._losses(indices, timesteps, "probe task", task)
        return torch.stack([each.sum() for each in losses]).sum() / num

    def _images(self, pool: Tensor, num: int, stream: str, *keys: int) -> list[int]:
        """`num` images of a pool; none repeats before all were drawn."""
        generator = keyed_generator(self._seed, stream, *keys)
        rounds = -(-num // len(pool))
        order = torch.cat([torch.randperm(len(pool), generator=generator) for _ in range(rounds)])
        indices: list[int] = pool[order[:num]].tolist()
        return indices

    def _losses(
        self, indices: list[int], timesteps: Tensor, stream: str, key: int
    ) -> Iterator[Tensor]:
        """Losses `[b]` of one batch after another, times the scale of mixed precision."""
        module = self._module
        scale = loss_scale(gradient_scaler(module.trainer), module.device)

        def noise(part: slice) -> Tensor:
            shape = module.image_shape
            return step_noise(part, shape, self._seed, key, module.device, stream=stream)

        batches = batched_losses(
            module, self._dataset, indices, timesteps, noise, batch_size=self._batch_size
        )
        for losses, _ in batches:
            yield losses * scale


def batched_losses(
    pl_module: MultiTaskDiffusion,
    dataset: ImageDataset,
    indices: Sequence[int],
    timesteps: Tensor,
    noise: Callable[[slice], Tensor],
    *,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Losses of images with given timesteps and noise, one batch after another.

    Args:
        pl_module: The module, attached to a trainer.
        dataset: Images to choose from.
        indices: Which images, `n`; each rank loads all that it asks for.
        timesteps: `[n]` on the CPU.
        noise: Gives the noise `[b, c, h, w]` of a slice of the `n` images.
        batch_size: Most images in one forward pass.

    Yields:
        The training loss `[b]`, and the mean squared error `[b]` without any weight.
    """
    device = pl_module.device
    for first in range(0, len(indices), batch_size):
        part = slice(first, min(first + batch_size, len(indices)))
        loaded = dataset.load(list(indices[part]), epoch=None)
        batch = Batch(loaded.images.to(device), loaded.labels.to(device), loaded.indices)
        steps = timesteps[part]
        unweighted = torch.zeros(len(steps), device=device)
        with pl_module.trainer.precision_plugin.forward_context():
            with torch.no_grad():  # the first stage is not measured
                x_start = pl_module.encode(batch)
            draws = Draws(
                steps.to(device),
                pl_module.clusters.task_of(steps),
                noise(part),
                batch.labels if pl_module.num_classes else None,
            )
            losses = pl_module.losses(x_start, draws, unweighted=unweighted)
            weighted = losses(torch.arange(len(steps), device=device))
        yield weighted, unweighted  # and free its graph before the next batch


def measurement_bar(trainer: L.Trainer, description: str, **settings: Any) -> tqdm:
    """A progress bar on rank 0, shown if the trainer shows one."""
    hidden = not trainer.is_global_zero or trainer.progress_bar_callback is None
    return tqdm(desc=description, leave=False, disable=hidden or None, **settings)
