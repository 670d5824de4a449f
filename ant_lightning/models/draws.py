"""Random draws of a training step, keyed by seed and step and made for the global batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ant_lightning.randomness import GOLDEN_RATIO, keyed_generator

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.data.batch import Batch
    from ant_lightning.models.settings import TimestepSampling
    from ant_lightning.tasks.clusters import TimestepClusters

__all__ = ["Draws", "TrainingDraws", "sample_shares", "spread_order", "step_noise"]

_BLOCK = 32  # images that share a generator


@dataclass(frozen=True)
class Draws:
    """Draws for the loss of a batch: `timesteps`, `tasks`, `labels` `[b]`; `noise [b, c, h, w]`."""

    timesteps: Tensor
    tasks: Tensor
    noise: Tensor
    labels: Tensor | None


@dataclass(frozen=True, kw_only=True)
class TrainingDraws:
    """Draws of a training step as a function of its number.

    Draws are made for the global batch, and each rank takes its part of them. With the placement
    `spread`, images get the same draws on any number of ranks, and each rank has about the same
    number of samples of a task. With `sorted`, each rank has as few tasks as possible; the parts
    rotate among the ranks from step to step, so that no task always has the images of one rank.

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
            # `sample` returns them sorted by task, so a contiguous part has few tasks.
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
        # Drawn for the images of the ranks before this one as well: the same draw for an image on
        # any number of ranks.
        generator = keyed_generator(self.seed, "class dropout", step)
        drawn = torch.rand(mine.stop, generator=generator, dtype=torch.float32)[mine]
        dropped = (drawn < self.class_dropout).to(labels.device, non_blocking=True)
        return labels.masked_fill(dropped, self.null_class)


def spread_order(num_images: int) -> Tensor:
    """A fixed permutation `[n]` whose contiguous parts are spread evenly over `0 .. n-1`.

    Entry j is the place of the fractional part of `0.618 j` (golden ratio) when the fractional
    parts of all j are sorted. Applied to samples sorted by task, any contiguous part of length m
    has a share `m / n` of the samples of each task, to within about 2 samples.
    """
    fractions = (torch.arange(num_images, dtype=torch.float64) * GOLDEN_RATIO) % 1
    return fractions.argsort().argsort()  # twice: from the sorting order to places in it


def sample_shares(
    sizes: Tensor, num_samples: Tensor, allocation: Literal["equal", "proportional"]
) -> Tensor:
    """Weight of one sample of each task, `[k]`, that makes a stratified batch estimate uniform t.

    The share `|I_i| / T` of a cluster is divided by its number of samples. A cluster with less
    than one expected sample is missing from some batches. Its share is divided by the expected
    number instead, so that the estimate of the mean over uniform timesteps stays unbiased.

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

    Each block of 32 images has its own generator, keyed by (seed, step, number of the block). So
    an image has the same noise on any number of ranks, and not every image needs a generator. At
    most 62 images are drawn and not used.
    """
    first, last = mine.start // _BLOCK, -(-mine.stop // _BLOCK)
    blocks = []
    for block in range(first, last):
        generator = keyed_generator(seed, stream, step, block, device=device)
        blocks.append(
            torch.randn((_BLOCK, *shape), generator=generator, device=device, dtype=torch.float32)
        )
    return torch.cat(blocks)[mine.start - first * _BLOCK : mine.stop - first * _BLOCK]
