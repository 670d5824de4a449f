"""The axis of a process' own time, for figures and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor


class _HasTimes(Protocol):
    """What an axis needs of a process."""

    time_label: ClassVar[str]
    time_scale: ClassVar[Literal["linear", "log"]]

    @property
    def edges(self) -> Tensor: ...


class _HasCells(_HasTimes, Protocol):
    """What `NoiseCells` needs of a process."""

    @property
    def log_snr(self) -> Tensor: ...

    @property
    def density(self) -> Tensor: ...


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


class NoiseCells(NamedTuple):
    """What figures and tables need of a process: a checkpoint holds it, a reader needs no PyTorch.

    Attributes:
        time: The process' own time.
        log_snr: Log-SNR at the centres of the cells, `[T]`.
        density: How often training draws each cell, `[T]`; `None` if it depends on an image size
            that is not known.

    Examples:
        >>> from ant_lightning import FlowMatching
        >>> from ant_lightning.tasks.time_axis import NoiseCells
        >>> cells = NoiseCells.of(FlowMatching(num_timesteps=100))
        >>> NoiseCells.of_state(cells.state()).time.words(50, 100)
        '0.5 to 1'
    """

    time: TimeAxis
    log_snr: NDArray[np.float64]
    density: NDArray[np.float64] | None

    @classmethod
    def of(cls, process: _HasCells) -> NoiseCells:
        """The cells of a process."""
        try:
            density = process.density.double().cpu().numpy()
        except ConfigError:
            density = None
        return cls(TimeAxis.of(process), process.log_snr.double().cpu().numpy(), density)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> NoiseCells:
        """The inverse of `state`."""
        edges, log_snr = np.array(state["edges"]), np.array(state["log_snr"])
        density = None if state["density"] is None else np.array(state["density"])
        return cls(TimeAxis(edges, state["label"], state["log"]), log_snr, density)

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "edges": self.time.edges.tolist(),
            "label": self.time.label,
            "log": self.time.log,
            "log_snr": self.log_snr.tolist(),
            "density": None if self.density is None else self.density.tolist(),
        }
