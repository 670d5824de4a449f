"""Pictures of images: grids, generated beside real."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["image_grid", "sample_grid"]


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
