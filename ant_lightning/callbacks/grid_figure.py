"""The figure of generated images beside real ones, legible for any number, size and class."""

from __future__ import annotations

import math
import textwrap

import numpy as np
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image

# Pixels.
_SMALLEST, _LARGEST = 48, 128  # side of an image as it is shown
_PANEL, _GAP, _TOP, _BOTTOM, _LINE = 380, 20, 30, 40, 20
_DPI = 110
_CHARACTER = 8.6  # width at the font size of the caption

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def grid_columns(num_images: int, num_classes: int) -> int:
    """Columns of a grid that is about square, where one column has one class if that is possible.

    Few classes get several columns each, and more classes than fit lose their columns.
    """
    square = max(1, round(math.sqrt(num_images)))
    if not 1 <= num_classes <= 1.6 * square:
        # If possible, without an unfinished row.
        whole = [c for c in range(square, round(1.5 * square) + 1) if num_images % c == 0]
        return min(whole, default=square)
    return num_classes * max(1, round(square / num_classes))


def sample_grid(generated: Pixels, real: Pixels, *, columns: int, caption: str) -> Figure:
    """Generated images beside real ones, both uint8 `[n, c, h, w]`.

    Small images are enlarged by a whole factor, large ones reduced. Both panels have the same
    shape; where one side has fewer images its places stay empty.
    """
    rows = -(-max(len(generated), len(real)) // columns)
    grids = [image_grid(_resized(each), columns=columns, rows=rows) for each in (generated, real)]
    height, width = grids[0].shape[:2]
    room = max(width, _PANEL)  # a caption needs its width
    whole = 2 * room + 3 * _GAP
    lines = textwrap.wrap(caption, int(whole / _CHARACTER))
    top = _TOP + _LINE * len(lines)
    tall = height + top + _BOTTOM
    figure = Figure(figsize=(whole / _DPI, tall / _DPI), dpi=_DPI)
    for i, (grid, title) in enumerate(zip(grids, ("generated", "real"), strict=True)):
        left = _GAP + i * (room + _GAP) + (room - width) // 2
        # Placed by pixels, so that each pixel of the grid is one of the figure.
        axis = figure.add_axes((left / whole, _BOTTOM / tall, width / whole, height / tall))
        axis.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
        axis.set_title(title, fontsize=11)
        axis.axis("off")
    figure.text(0.5, 1 - 5 / tall, "\n".join(lines), ha="center", va="top", fontsize=10)
    return figure


def image_grid(images: Pixels, *, columns: int, rows: int | None = None) -> Pixels:
    """Images `[n, c, h, w]` as one picture `[rows (h + 1), columns (w + 1), c]`, row by row."""
    rows = -(-len(images) // columns) if rows is None else rows
    missing = rows * columns - len(images)
    # One white pixel below and to the right of each image separates it from the next.
    padded = np.pad(images, ((0, missing), (0, 0), (0, 1), (0, 1)), constant_values=255)
    padded[len(images) :] = 255
    grid: Pixels = rearrange(padded, "(r k) c h w -> (r h) (k w) c", k=columns)
    return grid


def _resized(images: Pixels) -> Pixels:
    """Images whose longer side is from `_SMALLEST` to `_LARGEST` pixels."""
    side = max(images.shape[2:])
    if side <= _LARGEST:
        factor = math.ceil(_SMALLEST / side)
        return images.repeat(factor, axis=2).repeat(factor, axis=3)
    height, width = (max(1, round(each * _LARGEST / side)) for each in images.shape[2:])
    flat = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BOX))
        for image in images
        for plane in image
    ]
    return np.stack(flat).reshape(*images.shape[:2], height, width)
