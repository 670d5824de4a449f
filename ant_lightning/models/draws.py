"""What is random in a training step; it does not depend on how many ranks share the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ant_lightning.randomness import keyed_generator

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.data.batch import Batch
    from ant_lightning.models.settings import TimestepSampling
    from ant_lightning.tasks.clusters import TimestepClusters

__all__ = ["Draws", "TrainingDraws", "sample_shares", "spread_order", "step_noise"]

_BLOCK = 32  # images that share a generator


@dataclass(frozen=True)
class Draws:
    """What is random in the loss of a batch: `timesteps`, `tasks` and `labels` `[b]`, `noise`."""

    timesteps: Tensor
    tasks: Tensor
    noise: Tensor
    labels: Tensor | None


@dataclass(frozen=True, kw_only=True)
class TrainingDraws:
    """Draws of a training step as a function of its number.

    They are those of the global batch, of which each rank takes its part. With the placement
    `spread` the same images get the same draws on any number of ranks, and the part of each rank
    has its share of each task. With `sorted` a part has as few tasks as possible, and the parts
    rotate among the ranks, so that no task is bound to the images of one rank.

    Args:
        timesteps: How timesteps are drawn; its method must not be `None`.
        placement: `spread` or `sorted`.
        class_dropout: Share of labels replaced by the null class.
        null_class: Label of no class; `None` if the backbone has none.
        num_classes: Classes of the backbone; 0 for no labels.
        image_shape: `(c, h, w)` of the noise.
        seed: Seed of all draws.
    """

    timesteps: TimestepSampling
    placement: Literal["spread", "sorted"]
    class_dropout: float
    null_class: int | None
    num_classes: int
    image_shape: tuple[int, int, int]
    seed: int

    def __call__(
        self, batch: Batch, clusters: TimestepClusters, *, step: int, rank: int, world_size: int
    ) -> Draws:
        """Timesteps, tasks, noise and labels of one rank's part of the batch of `step`."""
        b, device = len(batch.images), batch.images.device
        total, mine = b * world_size, slice(rank * b, (rank + 1) * b)
        generator = keyed_generator(self.seed, "timesteps", step)
        if self.timesteps.method == "stratified":
            timesteps, tasks = clusters.sample(
                total, generator=generator, allocation=self.timesteps.allocation
            )
            if self.placement == "sorted":
                part = (rank + step) % world_size
                order = torch.arange(part * b, (part + 1) * b)
            else:
                order = spread_order(total)[mine]
            timesteps, tasks = timesteps[order], tasks[order]
        else:
            start, stop = self.timesteps.interval or (0, clusters.num_timesteps)
            timesteps = torch.randint(start, stop, (total,), generator=generator)[mine]
            tasks = clusters.task_of(timesteps)
        noise = step_noise(mine, self.image_shape, self.seed, step, device)
        labels = self._labels(batch.labels, mine, step) if self.num_classes else None
        return Draws(timesteps.to(device, non_blocking=True), tasks, noise, labels)

    def _labels(self, labels: Tensor, mine: slice, step: int) -> Tensor:
        """The labels, with a share of them replaced by the null class."""
        if self.null_class is None or not self.class_dropout:
            return labels
        generator = keyed_generator(self.seed, "class dropout", step)
        drawn = torch.rand(mine.stop, generator=generator, dtype=torch.float32)[mine]
        dropped = (drawn < self.class_dropout).to(labels.device, non_blocking=True)
        return labels.masked_fill(dropped, self.null_class)


def spread_order(num_images: int) -> Tensor:
    """A fixed permutation `[n]` whose contiguous parts are spread evenly over `0 .. n-1`.

    Position j gets the rank of the fractional part of `0.618 j` among all of them. Applied to
    samples sorted by task, every part of length m has `m / n` of each task up to 2 samples or so.
    """
    fractions = (torch.arange(num_images, dtype=torch.float64) * 0.6180339887498949) % 1
    return fractions.argsort().argsort()


def sample_shares(
    sizes: Tensor, num_samples: Tensor, allocation: Literal["equal", "proportional"]
) -> Tensor:
    """Weight of each sample of a stratified batch in the mean over uniform timesteps, `[k]`.

    The share `|I_i| / T` of a cluster is divided among its samples. A cluster that has less than
    one sample to expect is missing from some batches; when it is there, it counts for those too:
    then the share is divided by the expectation.

    Args:
        sizes: Timesteps of each cluster, `[k]`.
        num_samples: Samples of each task in the batch, `[k]` float64.
        allocation: How the batch was drawn: see `TimestepClusters.counts`.
    """
    sizes = sizes.to(num_samples, non_blocking=True)
    total = num_samples.sum()
    expected = total * sizes / sizes.sum()
    if allocation == "equal":
        expected = (total / len(sizes)).expand_as(sizes)
    return sizes / sizes.sum() / num_samples.where(expected >= 1, expected)


def step_noise(
    mine: slice,
    shape: tuple[int, ...],
    seed: int,
    step: int,
    device: torch.device,
    *,
    stream: str = "noise",
) -> Tensor:
    """Standard normal noise of the images `mine` of a global batch, `[b, *shape]` float32.

    Every 32 images have a generator of their own, keyed by (seed, step, number of the block): at
    most 62 images are drawn in vain, and no generator is made for each image.
    """
    first, last = mine.start // _BLOCK, -(-mine.stop // _BLOCK)
    blocks = []
    for block in range(first, last):
        generator = keyed_generator(seed, stream, step, block, device=device)
        blocks.append(
            torch.randn((_BLOCK, *shape), generator=generator, device=device, dtype=torch.float32)
        )
    return torch.cat(blocks)[mine.start - first * _BLOCK : mine.stop - first * _BLOCK]
