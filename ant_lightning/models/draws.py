"""Random draws of a training step, keyed by seed and step and made for the global batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

from ant_lightning.randomness import GOLDEN_RATIO, keyed_generator
from ant_lightning.tasks.clusters import TimestepClusters

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ant_lightning.data.batch import Batch
    from ant_lightning.diffusion.condition import Condition
    from ant_lightning.diffusion.process import NoiseProcess
    from ant_lightning.models.conditions import Conditions
    from ant_lightning.models.settings import TimestepSampling

_BLOCK = 32  # images that share a generator


@dataclass(frozen=True)
class Draws:
    """Draws for the loss of a batch.

    Attributes:
        timesteps: Cells of the noise axis, int64 `[b]`.
        times: The process' own times inside these cells, `[b]`.
        tasks: Tasks of the cells, `[b]`.
        noise: Standard normal noise, `[b, c, h, w]`.
        condition: Given to the network beside the time: labels `[b]`, named tensors, or `None`.
        importance: Own density of each cell over that which it was drawn by, `[b]`; `None` for 1.
        is_corrected: Whether training multiplies the losses by the importance.
    """

    timesteps: Tensor
    times: Tensor
    tasks: Tensor
    noise: Tensor
    condition: Condition
    importance: Tensor | None = None
    is_corrected: bool = True

    @property
    def correction(self) -> Tensor | None:
        """Factors of the losses in training, `[b]`; `None` for 1."""
        return self.importance if self.is_corrected else None


@dataclass(frozen=True, kw_only=True)
class TrainingDraws:
    """Draws of a training step as a function of its number.

    Draws are made for the global batch, and each rank takes its part of them. With the placement
    `spread`, images get the same draws on any number of ranks, and each rank has about the same
    number of samples of a task. With `sorted`, each rank has as few tasks as possible; the parts
    rotate among the ranks from step to step, so that no task always has the images of one rank.

    Args:
        process: Its density says how cells are drawn, and it draws the times inside them.
        timesteps: How cells are drawn; its method must not be `None`.
        placement: `spread` or `sorted`.
        class_dropout: Share of images whose conditions are all replaced by their null values.
        conditions: What the backbone is conditioned on.
        image_shape: `(c, h, w)` of the noise.
        seed: Seed of all draws.
    """

    process: NoiseProcess
    timesteps: TimestepSampling
    placement: Literal["spread", "sorted"]
    class_dropout: float
    conditions: Conditions
    image_shape: tuple[int, int, int]
    seed: int

    @cached_property
    def density(self) -> Tensor | None:
        """The density of the process; `None` if uniform, whose draws are those of version 0.1."""
        density = self.process.density
        return None if bool((density == density[0]).all()) else density

    @property
    def training_density(self) -> Tensor | None:
        """How often training draws each cell now: by the proposal, if there is one."""
        proposal = self.timesteps.proposal
        return self.density if proposal is None else proposal.shares(self.process)

    def __call__(
        self, batch: Batch, clusters: TimestepClusters, *, step: int, rank: int, world_size: int
    ) -> Draws:
        """Cells, times, tasks, noise and condition of one rank's part of the batch of `step`."""
        b, device = len(batch.images), batch.images.device
        total, mine = b * world_size, slice(rank * b, (rank + 1) * b)
        generator = keyed_generator(self.seed, "timesteps", step)
        importance = None
        if self.timesteps.method == "stratified":
            cells, places, tasks = clusters.draw(
                total,
                generator=generator,
                allocation=self.timesteps.allocation,
                density=self.density,
            )
            # For the global batch: the last bit of a vectorised exp depends on the place in it.
            times = self.process.times(cells, places)
            # `draw` returns them sorted by task, so a contiguous part has few tasks.
            if self.placement == "sorted":
                part = (rank + step) % world_size
                order = torch.arange(part * b, (part + 1) * b)
            else:
                order = spread_order(total)[mine]
            cells, times, tasks = cells[order], times[order], tasks[order]
        else:
            interval = self.timesteps.interval or (0, clusters.num_timesteps)
            density = self.training_density
            cells, places = _plain(interval, total, generator, density)
            if self.timesteps.proposal is not None and density is not None:
                inside = slice(*interval)
                ratio = self.process.density / density
                ratio *= density[inside].sum() / self.process.density[inside].sum()
                importance = ratio[cells[mine]].to(device, torch.float32, non_blocking=True)
            cells, times = cells[mine], self.process.times(cells, places)[mine]
            tasks = clusters.task_of(cells)
        noise = step_noise(mine, self.image_shape, self.seed, step, device)
        condition = self._condition(batch, mine, step)
        return Draws(
            cells.to(device, non_blocking=True),
            on_device(times, device),
            tasks,
            noise,
            condition,
            importance,
            is_corrected=self.timesteps.proposal is None or self.timesteps.proposal.corrected,
        )

    def mean_loss(
        self,
        losses: Tensor,
        draws: Draws,
        clusters: TimestepClusters,
        *,
        num_samples: Tensor,
        world_size: int,
    ) -> Tensor:
        """The mean loss over the process' own density, however the batch was drawn.

        The mean of the results of all ranks is the estimate.

        Args:
            losses: One for each image of this rank, `[b]`.
            draws: Those of this rank.
            clusters: The tasks.
            num_samples: Samples of each task on all ranks, `[k]`.
            world_size: Number of ranks.
        """
        if self.timesteps.method == "stratified":
            masses = clusters.masses(self.density)
            shares = sample_shares(masses, num_samples, self.timesteps.allocation)
            tasks = draws.tasks.to(shares.device, non_blocking=True)
            # The shares already span all ranks: cancel the mean over ranks.
            return (losses * shares[tasks]).sum().float() * world_size
        if draws.importance is not None:
            losses = losses * draws.importance
        return losses.mean()

    def record(self, draws: Draws, mse: Tensor, *, gather: Callable[[Tensor], Any] | None) -> None:
        """Tell the proposal the losses of all ranks; `gather` stacks the tensors of the ranks."""
        proposal = self.timesteps.proposal
        if proposal is None:
            return
        weights = self.process.loss_weights_at(draws.times)
        losses = mse.detach() if weights is None else mse.detach() * weights.to(mse)
        cells = draws.timesteps
        if gather is not None:
            cells, losses = gather(cells).flatten(), gather(losses).flatten()
        if bool(losses.isfinite().all()):
            proposal.record(cells.cpu(), losses.cpu())

    def _condition(self, batch: Batch, mine: slice, step: int) -> Condition:
        """The condition, with that of a share of the images replaced by its null values."""
        condition = self.conditions.of_batch(batch)
        if condition is None or not self.class_dropout or self.conditions.without_null:
            return condition
        # Drawn for the images of the ranks before this one as well: the same draw for an image on
        # any number of ranks.
        generator = keyed_generator(self.seed, "class dropout", step)
        drawn = torch.rand(mine.stop, generator=generator, dtype=torch.float32)[mine]
        dropped = (drawn < self.class_dropout).to(batch.images.device, non_blocking=True)
        return self.conditions.dropped(condition, dropped)


def _plain(
    interval: tuple[int, int], total: int, generator: torch.Generator, density: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cells of an interval by the density alone (`None`: uniform), and the places inside them."""
    start, stop = interval
    if density is None:
        cells = torch.randint(start, stop, (total,), generator=generator)
        return cells, torch.rand(total, generator=generator, dtype=torch.float64)
    part = TimestepClusters((0, stop - start))
    # In random order already: the numbers of one task are independent.
    cells, places, _ = part.draw(total, generator=generator, density=density[start:stop])
    return start + cells, places


def spread_order(num_images: int) -> Tensor:
    """A fixed permutation `[n]` whose contiguous parts are spread evenly over `0 .. n-1`.

    Entry j is the place of the fractional part of `0.618 j` (golden ratio) when the fractional
    parts of all j are sorted. Applied to samples sorted by task, any contiguous part of length m
    has a share `m / n` of the samples of each task, to within about 2 samples.
    """
    fractions = (torch.arange(num_images, dtype=torch.float64) * GOLDEN_RATIO) % 1
    return fractions.argsort().argsort()  # twice: from the sorting order to places in it


def sample_shares(
    masses: Tensor, num_samples: Tensor, allocation: Literal["equal", "proportional"]
) -> Tensor:
    """Weight of one sample of each task, `[k]`, that makes a stratified batch estimate plain draws.

    The mass of a cluster is divided by its number of samples. A cluster with less than one expected
    sample is missing from some batches. Its mass is divided by the expected number instead, so that
    the estimate of the mean over the process' own density stays unbiased.

    Args:
        masses: Mass of each cluster under the density, or its number of timesteps, `[k]`.
        num_samples: Samples of each task in the batch, `[k]` float64.
        allocation: How the batch was drawn: see `TimestepClusters.counts`.
    """
    masses = masses.to(num_samples, non_blocking=True)
    total = num_samples.sum()
    expected = total * masses / masses.sum()
    if allocation == "equal":
        expected = (total / len(masses)).expand_as(masses)
    return masses / masses.sum() / num_samples.where(expected >= 1, expected)


def on_device(times: Tensor, device: torch.device) -> Tensor:
    """Times on a device; float32 if it has no float64."""
    if device.type == "mps" and times.dtype == torch.float64:
        times = times.float()
    return times.to(device, non_blocking=True)


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
