"""Held-out losses inside an interval of timesteps, with the same noise for every model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.data.batch import Batch
from ant_lightning.models.denoiser import Draws
from ant_lightning.randomness import ImageNoise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ant_lightning.data.loader import ImageDataset
    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["interval_losses"]

_GOLDEN = 0.6180339887498949


@torch.no_grad()
def interval_losses(
    module: MultiTaskDiffusion,
    dataset: ImageDataset,
    indices: Sequence[int],
    interval: tuple[int, int],
    *,
    num_draws: int,
    batch_size: int,
    seed: int,
) -> Tensor:
    """Unweighted loss of each image, the mean over some of the interval's timesteps.

    Image i sees `num_draws` timesteps at equal distances, from a start that is a golden-ratio
    sequence over the images: together they cover the interval evenly. Timesteps and noise depend
    on the seed, the image and the draw alone (common random numbers), so that the difference of
    two models has no noise but that of the images.

    Args:
        module: With the weights to be measured.
        dataset: Held-out images.
        indices: Which of them.
        interval: `[start, stop)`.
        num_draws: Timesteps for each image.
        batch_size: Most losses in one forward pass.
        seed: Of the noise.

    Returns:
        `[len(indices)]` float64 on the CPU.
    """
    start, stop = interval
    device = module.device
    keys = [(image, draw) for image in indices for draw in range(num_draws)]
    parts = []
    for first in range(0, len(keys), batch_size):
        part = keys[first : first + batch_size]
        images, draws = torch.tensor(part, dtype=torch.float64).unbind(1)
        position = (images * _GOLDEN + draws / num_draws) % 1
        timesteps = start + (position * (stop - start)).long().clamp(max=stop - start - 1)
        noise = ImageNoise(
            [image * num_draws + draw for image, draw in part],
            shape=module.image_shape,
            seed=seed,
            stream="negative transfer",
            device=device,
        )()
        loaded = dataset.load([image for image, _ in part], epoch=None)
        batch = Batch(loaded.images.to(device), loaded.labels.to(device), loaded.indices)
        mse = torch.zeros(len(part), device=device, dtype=torch.float32)
        with module.trainer.precision_plugin.forward_context():
            made = Draws(
                timesteps.to(device),
                module.clusters.task_of(timesteps),
                noise,
                batch.labels if module.num_classes else None,
            )
            losses = module.losses(module.encode(batch), made, unweighted=mse)
            losses(torch.arange(len(part), device=device))
        parts.append(mse.cpu().double())
    return torch.cat(parts).view(len(indices), num_draws).mean(1)
