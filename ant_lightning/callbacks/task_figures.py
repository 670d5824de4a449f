"""Figures of the tasks of one model: losses and weights over time, and a number for each pair."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ant_lightning.callbacks.axes_style import plain_log_axis, task_colors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ant_lightning.tasks.clusters import TimestepClusters
    from ant_lightning.tasks.time_axis import TimeAxis


def task_labels(clusters: TimestepClusters, time: TimeAxis) -> list[str]:
    """The interval of each task: `0-99` of timesteps, `0.1 to 0.2` of another time."""
    return [time.words(start, stop) for start, stop in pairwise(clusters.boundaries)]


def pair_heat_map(
    values: NDArray[np.float64],
    *,
    labels: Sequence[str],
    title: str,
    rows: str,
    bar: str,
    unit: str = "timesteps",
    number: str = "{:.2f}",
    shades: NDArray[np.float64] | None = None,
) -> Figure:
    """A matrix `[k, k]` with its numbers; colours go from -1 (blue) over 0 to 1 (red).

    Args:
        values: The numbers; row i and column j are the tasks i and j.
        labels: The interval of each task.
        title: The title.
        rows: Label of the rows, before `of task i`.
        bar: Label of the colour bar.
        unit: What the intervals are made of.
        number: Format of the numbers.
        shades: Numbers that decide the colours; by default the values.
    """
    figure = Figure(figsize=(5.4, 4.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    colours = values if shades is None else shades
    image = axis.imshow(colours, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set(xlabel=f"{unit} of task j", ylabel=f"{rows}{unit} of task i")
    axis.set_title(title, fontsize=9)
    for (i, j), value in np.ndenumerate(values):
        # Black is hard to read on the dark ends of the colour map.
        color = "white" if abs(colours[i, j]) > 0.6 else "black"
        axis.text(j, i, number.format(value), ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axis, label=bar)
    return figure


def transfer_heat_map(
    transfer: NDArray[np.float64], *, labels: Sequence[str], title: str, unit: str = "timesteps"
) -> Figure:
    """Transfer `[k, k]` in per cent of task j's loss: blue harms, red helps.

    The colour is `Z[i, j] / max(|Z[i, i]|, |Z[j, j]|)`, cut at ±1, because the entries differ by
    orders of magnitude; the numbers are the entries themselves.
    """
    own = np.abs(np.diag(transfer))
    largest = np.maximum(own[:, None], own[None])
    shades = np.divide(transfer, largest, out=np.zeros_like(transfer), where=largest > 0)
    return pair_heat_map(
        100 * transfer,
        labels=labels,
        title=title,
        rows="gradient step on the ",
        unit=unit,
        bar="relative to the larger own effect of i and j",
        number="{:+.2f}%",
        shades=shades.clip(-1, 1),
    )


def task_history(
    steps: NDArray[np.int64],
    losses: NDArray[np.float64],
    weights: NDArray[np.float64],
    *,
    labels: Sequence[str],
    unit: str = "timesteps",
) -> Figure:
    """Loss and effective weight of each task over training, `[n, k]` each, on log axes."""
    figure = Figure(figsize=(10.6, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2)
    colors, once = task_colors(len(labels)), len(steps) == 1
    curves = {"loss": losses, "effective weight": weights}
    for axis, (name, values) in zip(axes, curves.items(), strict=True):
        for task, (column, label, color) in enumerate(zip(values.T, labels, colors, strict=True)):
            # A line of one point would not be seen, and points of one step lie on each other.
            places = [task] if once else steps
            marker = "o" if len(steps) < 20 else ""
            axis.plot(
                places, column, label=label, color=color, linewidth=1.3, marker=marker, markersize=4
            )
        plain_log_axis(axis, values.ravel().tolist())
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_xlabel("task" if once else "optimizer step")
        end = f"\none measurement, at step {steps[0]}" if once else ""
        axis.set_title(f"{name} of each task{end}", fontsize=9)
        axis.grid(alpha=0.3)
        # Beside the panel, where it hides no line.
        place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
        axis.legend(fontsize=7, title=unit, title_fontsize=7, frameon=False, **place)
    return figure
