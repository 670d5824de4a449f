"""Clusters of timesteps: `0 .. T-1` cut into half-open intervals, one for each task.

A timestep is a cell of the noise axis: for processes with a continuous time, an interval of it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError, check_at_least

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class CellDraws(NamedTuple):
    """Cells and tasks, int64 `[b]`, and the place inside each cell, float64 in [0, 1), `[b]`."""

    cells: Tensor
    places: Tensor
    tasks: Tensor


class _Table(NamedTuple):
    """Mass of each cluster `[k]`; the cdf of each cluster at the edges of its cells, `[T]` each."""

    masses: Tensor
    begins: Tensor
    ends: Tensor


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

    def masses(self, density: Float[Tensor, " T"] | None = None) -> Float[Tensor, " k"]:
        """Share of each cluster in the draws of a density, `[k]` float64; by default uniform.

        Raises:
            ConfigError: If the density is not `[T]`, or a cluster has no mass.
        """
        if density is None:
            return self.sizes.double() / self.num_timesteps
        return self._table(density).masses

    def _table(self, density: Tensor) -> _Table:
        """Masses and cdf of the clusters, kept until another density is asked for."""
        kept = self.__dict__.get("_kept")
        if kept is not None and kept[0] is density and kept[1] == density._version:
            found: _Table = kept[2]
            return found
        if density.shape != (self.num_timesteps,):
            raise ConfigError(
                f"density: must have the shape [{self.num_timesteps}], one for each cell, found "
                f"{list(density.shape)}"
            )
        table = self._made_table(density.double())
        self.__dict__["_kept"] = (density, density._version, table)
        return table

    def _made_table(self, density: Tensor) -> _Table:
        # Summed inside each cluster: differences of a cumulative sum lose the digits of the tails.
        parts = density.split(self.sizes.tolist())
        masses = torch.stack([part.sum() for part in parts])
        if not bool((masses > 0).all()):
            empty = int((~(masses > 0)).nonzero()[0, 0])
            raise ConfigError(
                f"density: must have mass in every cluster, found {float(masses[empty])} in task "
                f"{empty}"
            )
        # Task i has the cdf i .. i + 1: one increasing table for all tasks.
        cdfs = [
            i + part.cumsum(0) / mass
            for i, (part, mass) in enumerate(zip(parts, masses, strict=True))
        ]
        ends = torch.cat([cdf.clamp(max=i + 1) for i, cdf in enumerate(cdfs)])
        stops = torch.tensor(self.boundaries[1:], device=ends.device)
        ends[stops - 1] = torch.arange(1, self.num_tasks + 1, dtype=ends.dtype, device=ends.device)
        begins = torch.cat([ends.new_zeros(1), ends[:-1]])
        return _Table(masses / masses.sum(), begins, ends)

    def counts(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        allocation: Literal["equal", "proportional"] = "equal",
        density: Float[Tensor, " T"] | None = None,
    ) -> Int[Tensor, " k"]:
        """Random number of samples of each task in a batch, `[k]` with the sum `batch_size`.

        Every count is the floor or the ceiling of its expectation, which is `batch_size / k`
        (`equal`) or `batch_size` times the mass of the cluster (`proportional`).

        Args:
            batch_size: Number of samples, at least 1; it may be smaller than `k`.
            generator: Source of randomness; the result is on its device.
            allocation: `equal` or `proportional` expectations.
            density: Mass of each cell, `[T]`; by default uniform, so that a cluster has the mass
                `|I_i| / T`.

        Raises:
            ConfigError: If `batch_size`, `allocation` or `density` breaks its rule.
        """
        check_at_least(1, batch_size=batch_size)
        device = generator.device if generator is not None else None
        if allocation == "equal":
            # Random tasks get the samples left over, so that none is drawn more often.
            each, rest = divmod(batch_size, self.num_tasks)
            counts = torch.full((self.num_tasks,), each, device=device)
            counts[torch.randperm(self.num_tasks, generator=generator, device=device)[:rest]] += 1
            return counts
        if allocation != "proportional":
            raise ConfigError(
                f"allocation: must be 'equal' or 'proportional', found {allocation!r}"
            )
        # Systematic sampling: the end `batch_size` times the cumulative mass of each task is
        # rounded down after adding the same random offset in [0, 1).
        if density is None:  # in exact integers times T
            num_timesteps = self.num_timesteps
            offset = torch.randint(num_timesteps, (), generator=generator, device=device)
            ends = batch_size * torch.tensor(self.boundaries, device=device)
            return ((ends + offset) // num_timesteps).diff()
        shift = torch.rand((), generator=generator, device=device, dtype=torch.float64)
        masses = self.masses(density).to(shift.device)
        stops = (batch_size * masses.cumsum(0)[:-1] + shift).floor().long().clamp(max=batch_size)
        return torch.cat([stops.new_tensor([0]), stops, stops.new_tensor([batch_size])]).diff()

    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        allocation: Literal["equal", "proportional"] = "equal",
        density: Float[Tensor, " T"] | None = None,
    ) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """Draw timesteps: `counts` of them for each task, by the density inside its cluster.

        Returns:
            `timesteps [b]` and `task_ids [b]`, int64, sorted by task, on the generator's device
            (or the CPU).

        Raises:
            ConfigError: If `batch_size`, `allocation` or `density` breaks its rule, see `counts`.
        """
        drawn = self.draw(batch_size, generator=generator, allocation=allocation, density=density)
        return drawn.cells, drawn.tasks

    def draw(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        allocation: Literal["equal", "proportional"] = "equal",
        density: Float[Tensor, " T"] | None = None,
    ) -> CellDraws:
        """Draw cells as `sample` does, and a place inside each cell.

        One uniform number gives both: inside its cluster it is a quantile of the density, whose
        whole part is the cell and whose rest is the place. `NoiseProcess.times(cells, places)`
        turns it into a time.
        """
        # One draw of counts, and one uniform number for each sample. In float64: a float32 number
        # has 24 bits, too coarse a grid for clusters of a million timesteps.
        counts = self.counts(
            batch_size, generator=generator, allocation=allocation, density=density
        )
        tasks = _numbered(counts.cumsum(0), batch_size)
        uniform = torch.rand(
            batch_size, generator=generator, device=tasks.device, dtype=torch.float64
        )
        if density is None:
            starts = torch.tensor(self.boundaries, device=tasks.device)
            offsets = uniform * starts.diff()[tasks]
            cells = self._cell_of(starts[tasks] + offsets.long())
            return CellDraws(cells, offsets - offsets.floor(), tasks)
        table = self._table(density.to(tasks.device))
        # Rounding must not reach the next task's part of the table.
        wanted = torch.minimum(tasks + uniform, (tasks + 1) * (1 - 2.0**-52))
        cells = torch.searchsorted(table.ends, wanted, right=True)
        begins = table.begins[cells]
        places = (wanted - begins) / (table.ends[cells] - begins)
        return CellDraws(self._cell_of(cells), places.clamp_(0, 1 - 2.0**-53), tasks)

    def _cell_of(self, places: Tensor) -> Tensor:
        """The cell at each place of `boundaries`."""
        return places


def _numbered(stops: Tensor, length: int) -> Tensor:
    """Interval that each of `0 .. length-1` lies in: the number of `stops` that are not above it.

    Not by `repeat_interleave` or `bucketize`: these start threads for a few hundred numbers, which
    takes milliseconds on busy cores.
    """
    marks = torch.zeros(length + 1, dtype=torch.int64, device=stops.device)
    return marks.index_add_(0, stops, torch.ones_like(stops)).cumsum(0)[:length]
