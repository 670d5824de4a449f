"""One image file as pixels: decoding, channels, and ADM's crop."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from ant_lightning.errors import ConfigError, FileError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FORMATS", "SUFFIXES", "UNREADABLE", "Crop", "open_picture", "read_picture"]

Crop = Literal["center_adm", "resize"]
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
# Whatever a file is called, only these decoders see it: others run programs (PostScript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
# Pillow reports damage as any of these, or does not look, so that Python finds a number where an
# offset should be; OSError covers truncated files, DecompressionBombError images of more than 179
# million pixels.
UNREADABLE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    struct.error,
    UnidentifiedImageError,
    Image.DecompressionBombError,
)


def read_picture(path: Path, *, image_size: int, channels: int, crop: Crop) -> np.ndarray:
    """Pixels of a file as uint8 `[image_size, image_size, channels]`.

    Args:
        path: The file.
        image_size: Side in pixels.
        channels: 3 for colour, 1 for grey; a file of the other kind is converted.
        crop: `center_adm` scales the shorter side to `image_size` and cuts the middle out, as ADM
            and DiT do: halving with a box filter while the side is at least twice as long, then
            bicubic. `resize` scales both sides, which changes the proportions.

    Raises:
        FileError: Naming the file, if it cannot be decoded.
    """
    picture = open_picture(path, channels=channels)
    if crop == "resize":
        if picture.size != (image_size, image_size):
            picture = picture.resize((image_size, image_size), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture)
    else:
        while min(picture.size) >= 2 * image_size:
            half = (picture.width // 2, picture.height // 2)
            picture = picture.resize(half, Image.Resampling.BOX)
        factor = image_size / min(picture.size)
        scaled = (round(picture.width * factor), round(picture.height * factor))
        if scaled != picture.size:
            picture = picture.resize(scaled, Image.Resampling.BICUBIC)
        top, left = (picture.height - image_size) // 2, (picture.width - image_size) // 2
        pixels = np.asarray(picture)[top : top + image_size, left : left + image_size]
    return pixels.reshape(image_size, image_size, channels)


def open_picture(path: Path, *, channels: int) -> Image.Image:
    """A decoded file as 8-bit grey or RGB; alpha is composited on white, EXIF is not looked at.

    16-bit greys are scaled to 8 bits.

    Raises:
        FileError: If the file is damaged, truncated, no image, or of floats or 32-bit integers.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            file.load()
            picture: Image.Image = file
            if file.mode.startswith("I"):
                return _from_integers(np.asarray(file), path).convert(_mode(channels))
            if file.mode == "F":
                raise FileError(f"image {path}: must have 8 or 16 bits, found floats")
            if file.has_transparency_data:
                colour = file.convert("RGBA")
                white = Image.new("RGBA", file.size, "white")
                picture = Image.alpha_composite(white, colour)
            elif file.mode not in {"L", "RGB"}:
                picture = file.convert("RGB")
            return picture.convert(_mode(channels))
    except UNREADABLE as error:
        if isinstance(error, ConfigError):
            raise
        raise FileError(
            f"image {path}: cannot be decoded, truncated or damaged ({error})"
        ) from error


def _mode(channels: int) -> str:
    return "RGB" if channels == 3 else "L"


def _from_integers(values: np.ndarray, path: Path) -> Image.Image:
    """An 8-bit image of 16-bit greys, which Pillow gives as integers of 16 or 32 bits."""
    largest = int(values.max())
    if largest > 65535 or int(values.min()) < 0:
        raise FileError(f"image {path}: must have 8 or 16 bits, found the value {largest}")
    return Image.fromarray(np.round(values / 257.0).astype(np.uint8))
