"""Draws of a global batch that do not depend on how many ranks share it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from ant_lightning.randomness import keyed_generator

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["dropped_labels", "sample_shares", "spread_order", "step_noise"]

_BLOCK = 32  # images that share a generator


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


def dropped_labels(
    labels: Tensor, null_class: int | None, share: float, mine: slice, seed: int, step: int
) -> Tensor:
    """`labels` of the images `mine` of a global batch with a share replaced by the null class."""
    if null_class is None or not share:
        return labels
    generator = keyed_generator(seed, "class dropout", step)
    drop = torch.rand(mine.stop, generator=generator, dtype=torch.float32) < share
    return labels.masked_fill(drop[mine].to(labels.device, non_blocking=True), null_class)
