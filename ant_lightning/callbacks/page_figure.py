"""One page of several figures, each under its heading."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_HEADING = 44  # pixels
_FONT = 22
_LINE, _SMALL, _SMALLEST = 28, 15, 11  # height of the line of numbers, and sizes of its font
_MARGIN = 12
_WIDEST = 890  # what TensorBoard shows of a picture in a window of 1280 pixels


def stacked_page(pictures: Mapping[str, Path], *, numbers: str = "") -> NDArray[np.uint8]:
    """A line of numbers, and image files under their headings, as one picture `[h, w, 3]`.

    Args:
        numbers: The line; nothing for none.
        pictures: Files by heading, from top to bottom, which are numbered. The page is as wide as
            the widest picture or heading; wider pictures than 866 pixels are scaled down to that.
    """
    opened = {
        f"{number}  {title}": _narrow(Image.open(path).convert("RGB"))
        for number, (title, path) in enumerate(pictures.items(), 1)
    }
    font = ImageFont.load_default(size=_FONT)
    widths = [2 * _MARGIN + math.ceil(font.getlength(title)) for title in opened]
    fonts = [ImageFont.load_default(size=size) for size in range(_SMALL, _SMALLEST - 1, -1)]
    room = _WIDEST - 2 * _MARGIN
    small = next((font for font in fonts if font.getlength(numbers) <= room), fonts[-1])
    widths.append(2 * _MARGIN + math.ceil(small.getlength(numbers)))
    width = max([*widths, *(2 * _MARGIN + picture.width for picture in opened.values())])
    first = _LINE if numbers else 0
    height = first + sum(_HEADING + picture.height for picture in opened.values())
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, 4), numbers, fill=(20, 20, 20), font=small)
    top = first
    for title, picture in opened.items():
        draw.rectangle((0, top, width, top + _HEADING - 8), fill=(235, 239, 244))
        draw.text((_MARGIN, top + 6), title, fill=(20, 20, 20), font=font)
        page.paste(picture, ((width - picture.width) // 2, top + _HEADING))
        top += _HEADING + picture.height
    return np.asarray(page)


def _narrow(picture: Image.Image) -> Image.Image:
    """The picture, scaled down if the page would otherwise be cut off."""
    width = min(picture.width, _WIDEST - 2 * _MARGIN)
    if width == picture.width:
        return picture
    height = round(picture.height * width / picture.width)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
