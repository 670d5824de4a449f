"""Clusters of timesteps: `0 .. T-1` cut into half-open intervals, one for each task."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch

from ant_lightning.errors import ConfigError, check_at_least

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

__all__ = ["TimestepClusters"]


@dataclass(frozen=True)
class TimestepClusters:
    """`k` contiguous clusters of the timesteps `0 .. T-1`; cluster i is task i.

    Attributes:
        boundaries: `k + 1` increasing integers from 0 to `T`; task i has the timesteps of
            `[boundaries[i], boundaries[i + 1])`. Any sequence is accepted and kept as a tuple.

    Raises:
        ConfigError: If the boundaries are not increasing integers that start at 0.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 3, arXiv 2306.00354.

    Examples:
        >>> import torch
        >>> from ant_lightning import TimestepClusters
        >>> clusters = TimestepClusters((0, 3, 10))
        >>> clusters.task_of(torch.tensor([2, 3, 9])).tolist()
        [0, 1, 1]
        >>> timesteps, tasks = clusters.sample(4)
        >>> tasks.tolist()
        [0, 0, 1, 1]
    """

    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        try:
            # operator.index refuses floats: a rounded boundary would leave a timestep never drawn.
            boundaries = tuple(operator.index(b) for b in self.boundaries)
        except TypeError:
            raise ConfigError(f"boundaries: must be integers, found {self.boundaries}") from None
        if len(boundaries) < 2 or boundaries[0] != 0:
            raise ConfigError(
                f"boundaries: must be at least two integers, the first 0, found {boundaries}"
            )
        if any(start >= stop for start, stop in pairwise(boundaries)):
            raise ConfigError(f"boundaries: each must be above the one before, found {boundaries}")
        object.__setattr__(self, "boundaries", boundaries)  # the dataclass is frozen

    @property
    def num_tasks(self) -> int:
        """Number of clusters `k`."""
        return len(self.boundaries) - 1

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps `T`."""
        return self.boundaries[-1]

    @property
    def sizes(self) -> Int[Tensor, " k"]:
        """Number of timesteps in each cluster, `[k]`, on the CPU."""
        return torch.tensor(self.boundaries).diff()

    def task_of(self, timesteps: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Task of each timestep, same shape and device.

        Raises:
            ConfigError: If the timesteps are not integers, or if one is outside `0 .. T-1`. The
                range is checked only for timesteps on the CPU: for others the host would have to
                wait for the accelerator.
        """
        if timesteps.is_floating_point() or timesteps.is_complex():
            raise ConfigError(f"timesteps: must be integers, found {timesteps.dtype}")
        if timesteps.device.type == "cpu" and timesteps.numel():
            low, high = int(timesteps.min()), int(timesteps.max())
            if low < 0 or high >= self.num_timesteps:
                raise ConfigError(
                    f"timesteps: must be in 0 .. {self.num_timesteps - 1}, found {low} .. {high}"
                )
        stops = torch.tensor(self.boundaries[1:], device=timesteps.device)
        return _numbered(stops, self.num_timesteps)[timesteps]

    def counts(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        allocation: Literal["equal", "proportional"] = "equal",
    ) -> Int[Tensor, " k"]:
        """Random number of samples of each task in a batch, `[k]` with the sum `batch_size`.

        Every count is the floor or the ceiling of its expectation, which is `batch_size / k`
        (`equal`) or `batch_size |I_i| / T` (`proportional`).

        Args:
            batch_size: Number of samples, at least 1; it may be smaller than `k`.
            generator: Source of randomness; the result is on its device.
            allocation: `equal` or `proportional` expectations.

        Raises:
            ConfigError: If `batch_size` or `allocation` breaks its rule.
        """
        check_at_least(1, batch_size=batch_size)
        device = generator.device if generator is not None else None
        if allocation == "equal":
            # Random tasks get the samples left over, so that none is drawn more often.
            each, rest = divmod(batch_size, self.num_tasks)
            counts = torch.full((self.num_tasks,), each, device=device)
            counts[torch.randperm(self.num_tasks, generator=generator, device=device)[:rest]] += 1
            return counts
        if allocation == "proportional":
            # Systematic sampling: the end `batch_size boundaries / T` of each task is rounded down
            # after adding the same random offset in [0, 1), here in exact integers times T.
            num_timesteps = self.num_timesteps
            offset = torch.randint(num_timesteps, (), generator=generator, device=device)
            ends = batch_size * torch.tensor(self.boundaries, device=device)
            return ((ends + offset) // num_timesteps).diff()
        raise ConfigError(f"allocation: must be 'equal' or 'proportional', found {allocation!r}")

    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        allocation: Literal["equal", "proportional"] = "equal",
    ) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """Draw timesteps: `counts` of them for each task, uniform inside its cluster.

        Returns:
            `timesteps [b]` and `task_ids [b]`, int64, sorted by task, on the generator's device
            (or the CPU).

        Raises:
            ConfigError: If `batch_size` or `allocation` breaks its rule, see `counts`.
        """
        # One draw of counts, and one uniform number for each sample. In float64: a float32 number
        # has 24 bits, too coarse a grid for clusters of a million timesteps.
        counts = self.counts(batch_size, generator=generator, allocation=allocation)
        tasks = _numbered(counts.cumsum(0), batch_size)
        uniform = torch.rand(
            batch_size, generator=generator, device=tasks.device, dtype=torch.float64
        )
        starts = torch.tensor(self.boundaries, device=tasks.device)
        offsets = (uniform * starts.diff()[tasks]).long()
        return starts[tasks] + offsets, tasks


def _numbered(stops: Tensor, length: int) -> Tensor:
    """Interval that each of `0 .. length-1` lies in: the number of `stops` that are not above it.

    Not by `repeat_interleave` or `bucketize`: these start threads for a few hundred numbers, which
    takes milliseconds on busy cores.
    """
    marks = torch.zeros(length + 1, dtype=torch.int64, device=stops.device)
    return marks.index_add_(0, stops, torch.ones_like(stops)).cumsum(0)[:length]
