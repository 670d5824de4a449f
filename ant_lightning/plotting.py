"""Figures from arrays: the pictures that callbacks log and that the docs show."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["cosine_heat_map", "image_grid", "sample_grid", "task_history"]


def image_grid(images: NDArray[np.uint8], *, columns: int) -> NDArray[np.uint8]:
    """Images `[n, c, h, w]` as one picture `[rows (h + 1), columns (w + 1), c]`, row by row."""
    num, channels, height, width = images.shape
    rows = -(-num // columns)
    canvas = np.full((rows * (height + 1), columns * (width + 1), channels), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return canvas


def sample_grid(
    generated: NDArray[np.uint8],
    real: NDArray[np.uint8],
    *,
    columns: int,
    caption: str,
) -> Figure:
    """Generated images beside real ones, both uint8 `[n, c, h, w]`."""
    figure = Figure(figsize=(9, 4.9), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, images, title in zip(axes, (generated, real), ("generated", "real"), strict=True):
        picture = image_grid(images, columns=columns)
        shown = picture[..., 0] if picture.shape[-1] == 1 else picture
        axis.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    figure.suptitle(caption, fontsize=10)
    return figure


def cosine_heat_map(cosines: NDArray[np.float64], *, labels: Sequence[str], title: str) -> Figure:
    """Cosines `[k, k]` of task gradients on a scale from -1 (blue) over 0 to 1 (red)."""
    figure = Figure(figsize=(5.4, 4.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    ticks = range(len(labels))
    axis.set_xticks(ticks, labels, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.set_xlabel("timesteps of task j")
    axis.set_ylabel("timesteps of task i")
    for (i, j), value in np.ndenumerate(cosines):
        color = "white" if abs(value) > 0.6 else "black"
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axis, label="cosine of the gradients")
    axis.set_title(title, fontsize=9)
    return figure


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
