"""Held-out losses inside an interval of timesteps, with the same noise for every model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.callbacks.fixed_loss import batched_losses
from ant_lightning.randomness import ImageNoise

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.data.dataset import ImageDataset
    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["interval_losses"]

_GOLDEN = 0.6180339887498949


@torch.no_grad()
def interval_losses(
    module: MultiTaskDiffusion,
    dataset: ImageDataset,
    interval: tuple[int, int],
    num_images: int,
    num_draws: int,
    batch_size: int,
    *,
    seed: int,
) -> Tensor:
    """Unweighted loss of each image, averaged over timesteps of the interval.

    Image i has `num_draws` equidistant timesteps. Their offsets are a golden-ratio sequence over
    the images, so that all timesteps together cover the interval evenly. Timesteps and noise
    depend only on seed, image and draw (common random numbers): the difference of two models has
    no noise but that of the images. Ranks share the images and get the same result.

    Args:
        module: The module with the weights to measure.
        dataset: Held-out images, of which the first `num_images` are used.
        interval: `[start, stop)`.
        num_images: Number of images `n`.
        num_draws: Timesteps of each image.
        batch_size: Most losses in one forward pass.
        seed: Seed of the noise.

    Returns:
        `[n]`, float64 on the CPU.
    """
    start, stop = interval
    trainer, device = module.trainer, module.device
    own = torch.arange(trainer.global_rank, num_images, trainer.world_size)
    images, draws = own.repeat_interleave(num_draws), torch.arange(num_draws).repeat(len(own))
    # In [0, 1): from the golden-ratio offset of the image, `num_draws` equal steps.
    position = (images.double() * _GOLDEN + draws.double() / num_draws) % 1
    timesteps = start + (position * (stop - start)).long().clamp(max=stop - start - 1)
    keys = (images * num_draws + draws).tolist()

    def noise(part: slice) -> Tensor:
        stream, shape = "negative transfer", module.image_shape
        return ImageNoise(keys[part], shape=shape, seed=seed, stream=stream, device=device)()

    batches = batched_losses(
        module, dataset, images.tolist(), timesteps, noise, batch_size=batch_size
    )
    mse = torch.cat([unweighted.cpu().double() for _, unweighted in batches])
    losses = torch.zeros(num_images, dtype=torch.float64)
    losses[own] = mse.view(-1, num_draws).mean(1)
    if trainer.world_size > 1:  # the losses of other ranks are 0 here
        losses = trainer.strategy.reduce(losses.to(device), reduce_op="sum").cpu()
    return losses
