"""Pictures of the tasks of one model: losses, weights, cosines of gradients, transfer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["cosine_heat_map", "task_history", "transfer_heat_map"]


def cosine_heat_map(cosines: NDArray[np.float64], *, labels: Sequence[str], title: str) -> Figure:
    """Cosines `[k, k]` of task gradients on a scale from -1 (blue) over 0 to 1 (red)."""
    return _task_matrix(
        cosines,
        labels,
        title,
        limit=1.0,
        rows="timesteps of task i",
        bar="cosine of the gradients",
        number="{:.2f}",
    )


def transfer_heat_map(
    transfer: NDArray[np.float64], *, labels: Sequence[str], title: str
) -> Figure:
    """Transfer `[k, k]` in per cent of task j's loss: blue harms, red helps.

    Colours are of `Z[i, j] / max(Z[i, i], Z[j, j])` cut at ±1, since the entries differ by orders
    of magnitude; the numbers are the entries themselves.
    """
    own = np.abs(np.diag(transfer))
    largest = np.maximum(own[:, None], own[None])
    shades = np.divide(transfer, largest, out=np.zeros_like(transfer), where=largest > 0)
    return _task_matrix(
        100 * transfer,
        labels,
        title,
        limit=1.0,
        shades=shades.clip(-1, 1),
        rows="gradient step on the timesteps of task i",
        bar="relative to the larger own effect of i and j",
        number="{:+.2f}%",
    )


def task_history(
    steps: NDArray[np.int64],
    losses: NDArray[np.float64],
    weights: NDArray[np.float64],
    *,
    labels: Sequence[str],
) -> Figure:
    """Loss and effective weight of each task over training, `[n, k]` each, on log axes."""
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    _curves(left, steps, losses, labels, "loss of each task")
    _curves(right, steps, weights, labels, "effective weight of each task")
    left.legend(fontsize=7, title="timesteps", title_fontsize=7)
    return figure


def _task_matrix(
    values: NDArray[np.float64],
    labels: Sequence[str],
    title: str,
    *,
    limit: float,
    rows: str,
    bar: str,
    number: str,
    shades: NDArray[np.float64] | None = None,
) -> Figure:
    """A k x k matrix with its numbers, blue below 0 and red above."""
    figure = Figure(figsize=(5.4, 4.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    colours = values if shades is None else shades
    image = axis.imshow(colours, cmap="RdBu_r", vmin=-limit, vmax=limit)
    ticks = range(len(labels))
    axis.set_xticks(ticks, labels, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.set_xlabel("timesteps of task j")
    axis.set_ylabel(rows)
    for (i, j), value in np.ndenumerate(values):
        color = "white" if abs(colours[i, j]) > 0.6 * limit else "black"
        text = number.format(value)
        axis.text(j, i, text, ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axis, label=bar)
    axis.set_title(title, fontsize=9)
    return figure


def _curves(
    axis: Axes,
    steps: NDArray[np.int64],
    values: NDArray[np.float64],
    labels: Sequence[str],
    title: str,
) -> None:
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(labels)))
    for column, (label, color) in enumerate(zip(labels, colors, strict=True)):
        axis.plot(steps, values[:, column], label=label, color=color, linewidth=1.3)
    axis.set_yscale("log")
    axis.set_xlabel("optimizer step")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3, which="both")
