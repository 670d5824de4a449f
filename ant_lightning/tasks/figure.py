"""Pictures of clusterings: which timesteps, which noise, and how often each timestep is drawn."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ant_lightning.affinity.figure import cell_edges

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from torch import Tensor

    from ant_lightning.tasks.clusters import TimestepClusters

__all__ = ["boundaries_figure", "clusterings_figure", "importance_density"]


def importance_density(clusters: TimestepClusters) -> NDArray[np.float64]:
    """How often each timestep is drawn, over how often uniform sampling draws it, `[T]`.

    With as many samples from every cluster it is `T / (k |I_i|)` for t in I_i; the mean is 1.
    """
    sizes = clusters.sizes.numpy().astype(np.float64)
    density: NDArray[np.float64] = np.repeat(
        clusters.num_timesteps / (clusters.num_tasks * sizes), clusters.sizes.numpy()
    )
    return density


def clusterings_figure(clusterings: Mapping[str, TimestepClusters], log_snr: Tensor) -> Figure:
    """Clusterings as rows of intervals, and the density of timesteps that each implies.

    Left over timesteps, right over log-SNR, noise growing to the right on both.

    Args:
        clusterings: By name.
        log_snr: Of the schedule, `[T]`.
    """
    figure = Figure(figsize=(10, 5), dpi=110, layout="constrained")
    panels = figure.subplots(2, 2, height_ratios=[1, 1.3], sharex="col")
    steps = np.arange(len(log_snr) + 1, dtype=np.float64)
    noise = cell_edges(log_snr.double().numpy())
    for column, (edges, name) in enumerate([(steps, "timestep"), (noise, "log-SNR")]):
        intervals, densities = panels[:, column]
        _intervals(intervals, clusterings, edges)
        for label, clusters in clusterings.items():
            densities.stairs(importance_density(clusters), edges, label=label, linewidth=1.6)
        densities.axhline(1, color="0.4", linestyle="--", linewidth=0.8)
        densities.set_ylim(bottom=0)
        densities.set_xlim(edges[0], edges[-1])  # noise grows to the right on both axes
        densities.set_xlabel(name)
        densities.grid(alpha=0.3, which="both")
        densities.label_outer()
        intervals.label_outer()
    panels[1, 0].set_ylabel("draws of a timestep\n(uniform = 1)")
    panels[1, 0].legend(fontsize=8)
    return figure


def boundaries_figure(
    history: Sequence[tuple[int, Sequence[int]]], log_snr: Tensor, *, last_step: int
) -> Figure:
    """The intervals of the tasks over a training that changed them.

    Args:
        history: Step from which on, and boundaries `0 .. T`, in the order of time.
        log_snr: Of the schedule, `[T]`.
        last_step: Where the last ones end.
    """
    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2)
    steps = [step for step, _ in history] + [max(last_step, history[-1][0] + 1)]
    noise = cell_edges(log_snr.double().numpy())
    num_tasks = len(history[0][1]) - 1
    colors = colormaps["viridis"](np.linspace(0.1, 0.95, num_tasks))
    for axis, name in zip(panels, ("timestep", "log-SNR"), strict=True):
        for task in range(num_tasks):
            ends = np.array([each[task : task + 2] for _, each in history]).T
            low, high = ends if name == "timestep" else noise[ends]
            axis.fill_between(
                steps, [*low, low[-1]], [*high, high[-1]], step="post", color=colors[task]
            )
            middle = (low[-1] + high[-1]) / 2
            axis.annotate(f" task {task}", (steps[-1], middle), fontsize=8, va="center")
        axis.set(xlabel="training step", ylabel=name, xlim=(steps[0], steps[-1]))
        axis.set_ylim(
            *((0, len(log_snr)) if name == "timestep" else noise[[0, -1]])
        )  # noise upwards
    return figure


def _intervals(
    axis: Axes, clusterings: Mapping[str, TimestepClusters], edges: NDArray[np.float64]
) -> None:
    for row, clusters in enumerate(clusterings.values()):
        colors = colormaps["viridis"](np.linspace(0.1, 0.95, clusters.num_tasks))
        for task, (start, stop) in enumerate(pairwise(clusters.boundaries)):
            width = edges[stop] - edges[start]
            axis.barh(row, width, left=edges[start], color=colors[task], edgecolor="white")
            middle = edges[start] + width / 2
            if abs(width) > 0.04 * abs(edges[-1] - edges[0]):
                axis.text(
                    middle,
                    row,
                    str(task),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="0.1" if task > clusters.num_tasks / 2 else "white",
                )
    axis.set_yticks(range(len(clusterings)), list(clusterings))
    axis.invert_yaxis()
