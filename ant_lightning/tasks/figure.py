"""Figures of clusters: their timesteps and noise levels, and how often each timestep is drawn."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ant_lightning.tasks.time_axis import TimeAxis

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

NoiseAxis = Literal["timestep", "log_snr"]
NOISE_AXES: dict[NoiseAxis, str] = {"timestep": "timestep", "log_snr": "log-SNR"}  # axis: label


class Intervals(Protocol):
    """What is drawn of `TimestepClusters`."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """First cells of the intervals, and the number of cells."""


def importance_density(
    clusters: Intervals, density: ArrayLike | None = None
) -> NDArray[np.float64]:
    """How often each cell is drawn, relative to uniform sampling, `[T]`.

    If every cluster has the same number of samples, it is `T p_t / (k P_i)` for t in `I_i`, where
    `P_i` is the mass of the cluster. Its mean over cells is 1.

    Args:
        clusters: The clusters.
        density: `p`, the process' own density, `[T]`; by default uniform, `1 / T`.
    """
    boundaries = np.array(clusters.boundaries)
    num_cells = boundaries[-1]
    own = np.full(num_cells, 1 / num_cells) if density is None else _float64(density)
    masses = np.add.reduceat(own, boundaries[:-1])
    # A cell of task i has the probability p_t / (k P_i); with uniform sampling it has 1 / T.
    shares = np.repeat(num_cells / (len(masses) * masses), np.diff(boundaries))
    drawn: NDArray[np.float64] = own * shares
    return drawn


def _float64(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def cell_edges(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges `[n + 1]` of cells around increasing or decreasing positions `[n]`."""
    if len(positions) == 1:
        return np.array([positions[0] - 0.5, positions[0] + 0.5])
    middles = (positions[1:] + positions[:-1]) / 2
    first, last = 2 * positions[0] - middles[0], 2 * positions[-1] - middles[-1]
    return np.concatenate([[first], middles, [last]])


def _log_snr_edges(log_snr: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges of the cells that end at the first and the last log-SNR, as the tables of a report."""
    edges: NDArray[np.float64] = cell_edges(log_snr).clip(log_snr.min(), log_snr.max())
    return edges


def clusterings_figure(
    clusterings: Mapping[str, Intervals],
    log_snr: ArrayLike,
    *,
    time: TimeAxis | None = None,
    density: ArrayLike | None = None,
) -> Figure:
    """Clusterings as rows of intervals, and how often each draws the cells of the noise axis.

    The left column is over the process' own time, the right one over log-SNR; noise grows to the
    right. The dashed line is the process' own density.

    Args:
        clusterings: Clusters by the name of their row.
        log_snr: Log-SNR of the cells, `[T]`.
        time: The process' own time; timesteps by default.
        density: The process' own density, `[T]`; uniform by default.
    """
    noise = _float64(log_snr)
    time = TimeAxis.timesteps(len(noise)) if time is None else time
    own = np.ones(len(noise)) if density is None else _float64(density) * len(noise)
    figure = Figure(figsize=(10, 5), dpi=110, layout="constrained")
    panels = figure.subplots(2, 2, height_ratios=[1, 1.3], sharex="col")
    edges_of = {
        "timestep": time.edges,
        "log_snr": _log_snr_edges(noise),
    }
    for (intervals, densities), axis in zip(panels.T, NOISE_AXES, strict=True):
        edges, by_time = edges_of[axis], axis == "timestep"
        label = time.label if by_time else NOISE_AXES[axis]
        densities.set_xscale("log" if by_time and time.log else "linear")
        _intervals(intervals, clusterings, edges, log=by_time and time.log)
        for name, clusters in clusterings.items():
            drawn = importance_density(clusters, density)
            # Without a baseline, as its lines to 0 at both ends would look like values.
            densities.stairs(drawn, edges, baseline=None, label=name, linewidth=1.6)
        dashed = {"color": "0.2", "linestyle": "--", "linewidth": 0.9}
        densities.stairs(own, edges, baseline=None, label="own density", **dashed)
        # Log-SNR falls with the timestep: these limits reverse its axis, so noise grows rightwards.
        densities.set(xlabel=label, xlim=(edges[0], edges[-1]))
        densities.set_ylim(bottom=0)
        intervals.set_title(f"the tasks over {label}", fontsize=9)
        densities.set_title(f"how often each {_cell(time)} is drawn", fontsize=9)
        densities.grid(alpha=0.3, which="both")
        densities.label_outer()
        intervals.label_outer()
    panels[1, 0].set_ylabel(f"draws of a {_cell(time)}\n(uniform = 1)")
    panels[1, 0].legend(fontsize=8)
    return figure


def boundaries_figure(
    history: Sequence[tuple[int, Sequence[int]]],
    log_snr: Tensor,
    *,
    last_step: int,
    time: TimeAxis | None = None,
) -> Figure:
    """The intervals of the tasks in the course of a training that changed them.

    Args:
        history: First step and boundaries `0 .. T` of each clustering, in order of time.
        log_snr: Log-SNR of the schedule, `[T]`.
        last_step: Step at which the last clustering ends.
        time: The process' own time; timesteps by default.
    """
    time = TimeAxis.timesteps(len(log_snr)) if time is None else time
    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2)
    steps = [step for step, _ in history] + [max(last_step, history[-1][0] + 1)]
    boundaries = np.array([each for _, each in history])
    noise = _log_snr_edges(log_snr.double().numpy())
    colors = _task_colors(boundaries.shape[1] - 1)
    for panel, axis in zip(panels, NOISE_AXES, strict=True):
        values = time.edges[boundaries] if axis == "timestep" else noise[boundaries]
        log = axis == "timestep" and time.log
        values = np.concatenate([values, values[-1:]])  # the last clustering ends at `last_step`
        for task, color in enumerate(colors):
            low, high = values[:, task], values[:, task + 1]
            panel.fill_between(steps, low, high, step="post", color=color)
            middle = (low[-1] * high[-1]) ** 0.5 if log else (low[-1] + high[-1]) / 2
            panel.annotate(f" task {task}", (steps[-1], middle), fontsize=8, va="center")
        label = time.label if axis == "timestep" else NOISE_AXES[axis]
        panel.set(xlabel="training step", ylabel=label, xlim=(steps[0], steps[-1]))
        panel.set_yscale("log" if log else "linear")
        panel.set_ylim(values[0, 0], values[0, -1])  # noise grows upwards
    return figure


def _intervals(
    panel: Axes,
    clusterings: Mapping[str, Intervals],
    edges: NDArray[np.float64],
    *,
    log: bool = False,
) -> None:
    for row, clusters in enumerate(clusterings.values()):
        colors = _task_colors(len(clusters.boundaries) - 1)
        for task, (start, stop) in enumerate(pairwise(clusters.boundaries)):
            width = edges[stop] - edges[start]
            panel.barh(row, width, left=edges[start], color=colors[task], edgecolor="white")
            places = np.log(edges) if log else edges  # as they lie on the page
            share = (places[stop] - places[start]) / (places[-1] - places[0])
            if share > 0.04:  # wide enough for its number
                # Viridis is bright for the upper half of the tasks.
                dark = "0.1" if task > len(colors) / 2 else "white"
                middle = (places[start] + places[stop]) / 2
                at = (np.exp(middle) if log else middle, row)
                panel.text(*at, str(task), ha="center", va="center", fontsize=8, color=dark)
    panel.set_yticks(range(len(clusterings)), list(clusterings))
    panel.invert_yaxis()  # the first clustering on top


def _cell(time: TimeAxis) -> str:
    return "timestep" if time.label == "timestep" else "cell"


def _task_colors(num_tasks: int) -> NDArray[np.float64]:
    colors: NDArray[np.float64] = colormaps["viridis"](np.linspace(0.1, 0.95, num_tasks))
    return colors
