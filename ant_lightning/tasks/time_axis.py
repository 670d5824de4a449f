"""The axis of a process' own time, for figures and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["TimeAxis"]


class _HasTimes(Protocol):
    """What an axis needs of a process."""

    time_label: ClassVar[str]
    time_scale: ClassVar[Literal["linear", "log"]]

    @property
    def edges(self) -> Tensor: ...


class TimeAxis(NamedTuple):
    """Where the cells of the noise axis lie in the time of a process.

    Attributes:
        edges: Edges of the cells, `[T + 1]`, increasing.
        label: Name of the time.
        log: Whether equal cells are equal steps of its logarithm.

    Examples:
        >>> from ant_lightning import EDM, DiscreteDiffusion, FlowMatching
        >>> from ant_lightning.tasks.time_axis import TimeAxis
        >>> axes = [TimeAxis.of(each()) for each in (DiscreteDiffusion, FlowMatching, EDM)]
        >>> [(axis.unit, axis.words(0, 500)) for axis in axes]
        [('timesteps', '0-499'), ('t', '0 to 0.5'), ('sigma', '0.002 to 0.4')]
    """

    edges: NDArray[np.float64]
    label: str = "timestep"
    log: bool = False

    @classmethod
    def of(cls, process: _HasTimes) -> TimeAxis:
        """The axis of a process."""
        edges = process.edges.double().cpu().numpy()
        return cls(edges, process.time_label, process.time_scale == "log")

    @classmethod
    def timesteps(cls, num_timesteps: int) -> TimeAxis:
        """The axis where nothing but the number of cells is known."""
        return cls(np.arange(num_timesteps + 1, dtype=np.float64))

    @property
    def unit(self) -> str:
        """What an interval is made of: `timesteps`, `t`, `sigma`."""
        return "timesteps" if self.label == "timestep" else self.label.partition(" ")[0]

    def words(self, start: int, stop: int) -> str:
        """The cells `[start, stop)`: `0-99` of timesteps, `0.1 to 0.2` of another time."""
        if self.label == "timestep":
            return f"{start}-{stop - 1}"
        return f"{self.edges[start]:.2g} to {self.edges[stop]:.2g}"

    def at(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Times at places on the axis of cells, where cell c covers c to c + 1."""
        cells = np.arange(len(self.edges), dtype=np.float64)
        if not self.log:
            return np.interp(places, cells, self.edges)
        times: NDArray[np.float64] = np.exp(np.interp(places, cells, np.log(self.edges)))
        return times
