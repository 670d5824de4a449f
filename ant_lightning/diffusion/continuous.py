"""What the processes with a continuous time share: a noise axis cut into equal cells."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch

from ant_lightning.diffusion.density_shifted import SizeShifted
from ant_lightning.diffusion.inputs import check_real_times
from ant_lightning.diffusion.process import NoiseProcess
from ant_lightning.errors import check_at_least

if TYPE_CHECKING:
    from typing import Self

    from jaxtyping import Float, Int
    from torch import Tensor

    from ant_lightning.diffusion.density import Coordinate, Density
    from ant_lightning.diffusion.process import Times


class ContinuousProcess(NoiseProcess):
    """A process over an interval of a coordinate z, cut into T equal cells.

    Args:
        density: How often training draws each z.
        num_timesteps: Number of cells, T.
        axis: The interval of z.
        coordinate: What z is.

    Raises:
        ConfigError: If `num_timesteps` is below 1, or the density does not fit.
    """

    def __init__(
        self,
        *,
        density: Density,
        num_timesteps: int,
        axis: tuple[float, float],
        coordinate: Coordinate,
    ) -> None:
        check_at_least(1, num_timesteps=num_timesteps)
        self.sampling_density = density
        self.coordinate: Coordinate = coordinate
        self._edges = torch.linspace(*axis, num_timesteps + 1, dtype=torch.float64)
        self._cells: tuple[Tensor, Tensor] | None = None  # what `on_cells` returns
        if not isinstance(density, SizeShifted):  # which waits for `for_size`
            self._cells = density.on_cells(self._edges, coordinate=coordinate)
        self._log_snr = self._log_snr_of_cells()

    @property
    def num_timesteps(self) -> int:
        """Number of cells, T."""
        return len(self._edges) - 1

    @property
    def log_snr(self) -> Float[Tensor, " T"]:
        """Log signal-to-noise ratio at the centre of each cell."""
        return self._log_snr

    @property
    def density(self) -> Float[Tensor, " T"]:
        """Share of the training draws that each cell has.

        Raises:
            ConfigError: If the density depends on the size of the images, which is not known.
        """
        return self._density_on_cells()[1]

    def for_size(self, height: int, width: int) -> Self:
        """The process for images of this size; itself, unless its density depends on it."""
        density = self.sampling_density.for_size(height, width)
        if density is self.sampling_density:
            return self
        process = copy.copy(self)
        process.sampling_density = density
        process._cells = density.on_cells(self._edges, coordinate=self.coordinate)
        return process

    def _density_on_cells(self) -> tuple[Tensor, Tensor]:
        if self._cells is None:
            return self.sampling_density.on_cells(self._edges, coordinate=self.coordinate)
        return self._cells

    @property
    def edges(self) -> Float[Tensor, " T+1"]:
        """Edges of the cells in the process' own time."""
        return self._time_of(self._edges)

    @property
    def min_time(self) -> float:
        """The lower end of the axis."""
        return float(self._time_of(self._edges[:1]))

    @property
    def max_time(self) -> float:
        """The upper end of the axis."""
        return float(self._time_of(self._edges[-1:]))

    def times(
        self, cells: Int[Tensor, " b"], u: Float[Tensor, " b"] | None = None
    ) -> Float[Tensor, " b"]:
        """Times inside cells, in float64; see the base class."""
        if u is None:
            edges = self._edges.to(cells.device)
            return self._time_of((edges[cells] + edges[cells + 1]) / 2)
        at = self._density_on_cells()[0].to(cells.device)
        return self._time_of(self.sampling_density.inside(at[cells], at[cells + 1], u.double()))

    def cells_at(self, times: Times) -> Int[Tensor, " b"]:
        """The cells that times lie in; times beyond the axis belong to the end cells."""
        check_real_times(self, times)
        return super().cells_at(times)

    def _log_snr_of_cells(self) -> Tensor:
        return self.log_snr_at(self.times(torch.arange(self.num_timesteps)))

    @abstractmethod
    def _time_of(self, z: Tensor) -> Tensor:
        """The process' own time at the coordinate z."""
