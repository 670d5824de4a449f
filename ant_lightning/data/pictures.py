"""Reads image files as pixels: decoding, rotation, channels, and ADM's crop."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import ExifTags, Image, features

from ant_lightning.errors import FileError
from ant_lightning.sizes import Size, height_and_width

if TYPE_CHECKING:
    from typing import BinaryIO

Crop = Literal["center_adm", "resize"]
# The only decoders that a file can reach, whatever its suffix: others run programs (PostScript).
_FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "GIF": (".gif",),
    "TGA": (".tga",),
}
# Optional parts of Pillow. If one is missing, its files count as unsupported.
if "avif" in features.get_supported():
    _FORMATS["AVIF"] = (".avif",)
if "jpg_2000" in features.get_supported():
    _FORMATS["JPEG2000"] = (".jp2", ".j2k")
SUFFIXES = frozenset(suffix for suffixes in _FORMATS.values() for suffix in suffixes)
# What a byte can hold at most: a code of LZW has 12 bits and stands for up to 4,096 pixels;
# deflate packs 1,032 bytes in one, of 8 pixels each. A header may claim any size.
_MOST_PIXELS_PER_BYTE = {"GIF": 4096 * 8 // 12, "PNG": 1032 * 8}
# Pillow's modes without colour.
GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16B"})
# The transpose for each value of the EXIF orientation tag; 1 and unknown values change nothing.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(
    path: Path, *, image_size: Size, channels: int, crop: Crop, exif_rotation: bool = True
) -> np.ndarray:
    """Read the pixels of a file as uint8 `[h, w, channels]`.

    Args:
        path: The file.
        image_size: Height and width in pixels; one number for a square.
        channels: 3 for colour, 1 for grey; a file of the other kind is converted.
        crop: `center_adm` scales the picture until it just covers `image_size` and cuts out the
            middle, as ADM and DiT do. The scaling halves with a box filter while both sides are at
            least twice as long, then is bicubic. `resize` scales both sides, which changes the
            proportions.
        exif_rotation: See `open_picture`.

    Raises:
        FileError: If the file cannot be decoded; names the file.
    """
    picture = open_picture(path, channels=channels, exif_rotation=exif_rotation)
    return fitted_pixels(picture, image_size=image_size, crop=crop)


def fitted_pixels(picture: Image.Image, *, image_size: Size, crop: Crop) -> np.ndarray:
    """Crop and resize an 8-bit picture; uint8 `[h, w, channels]`.

    Args:
        picture: A picture of mode `L` or `RGB`.
        image_size: Height and width in pixels; one number for a square.
        crop: See `read_picture`.
    """
    height, width = height_and_width(image_size, name="image_size")
    size = (width, height)
    # As in guided-diffusion's `center_crop_arr`: box filters halve, bicubic does the rest.
    if crop == "center_adm":
        while picture.width >= 2 * width and picture.height >= 2 * height:
            half = (picture.width // 2, picture.height // 2)
            picture = picture.resize(half, Image.Resampling.BOX)
        factor = max(width / picture.width, height / picture.height)
        size = (round(picture.width * factor), round(picture.height * factor))
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    top, left = (picture.height - height) // 2, (picture.width - width) // 2
    pixels = np.asarray(picture)[top : top + height, left : left + width]
    return pixels.reshape(height, width, -1)


def open_picture(
    source: Path | BinaryIO, *, channels: int, exif_rotation: bool = True
) -> Image.Image:
    """Decode a file as 8-bit grey or RGB; alpha is composited on white.

    16-bit greys are scaled to 8 bits. Of an animation, the first frame is decoded.

    Args:
        source: The path of the file, or its content.
        channels: 3 for colour, 1 for grey.
        exif_rotation: Whether to apply the EXIF orientation, as viewers do. TIFF has its own
            orientation tag, which is always applied.

    Raises:
        FileError: If the file is damaged, truncated, no image, or has float or 32-bit values.
    """
    try:
        with Image.open(source, formats=_formats(source)) as file:
            _check_size(file, source)
            return decoded_picture(file, channels=channels, exif_rotation=exif_rotation)
    except Exception as error:  # damage makes Pillow raise errors of many kinds
        name = source if isinstance(source, Path) else "an image"
        raise FileError(f"{name}: cannot be decoded, truncated or damaged ({error})") from error


def decoded_picture(file: Image.Image, *, channels: int, exif_rotation: bool = True) -> Image.Image:
    """An opened image as 8-bit grey or RGB; see `open_picture`, without its translated errors."""
    file.load()  # decodes here, where errors are caught
    picture = _in_8_bits(file, "RGB" if channels == 3 else "L")
    turn = _turn(file) if exif_rotation else None
    return picture if turn is None else picture.transpose(turn)


def is_grey(source: Path | BinaryIO) -> bool:
    """Whether an image is greyscale, from its header alone.

    Raises:
        FileError: If the file has no image header; names the file.
    """
    try:
        with Image.open(source, formats=_formats(source)) as file:
            return file.mode in GREY_MODES
    except Exception as error:
        name = source if isinstance(source, Path) else "an image"
        raise FileError(f"{name}: cannot be decoded ({error})") from error


def _check_size(file: Image.Image, source: Path | BinaryIO) -> None:
    """Refuse a header that claims more pixels than the bytes can hold, before they are reserved."""
    if isinstance(source, Path):
        num_bytes = source.stat().st_size
    else:
        here, num_bytes = source.tell(), source.seek(0, os.SEEK_END)
        source.seek(here)
    most = _MOST_PIXELS_PER_BYTE.get(file.format or "", math.inf) * num_bytes
    if file.width * file.height > most:
        raise ValueError(
            f"{num_bytes} bytes must have at most {most} pixels, found {file.width} x {file.height}"
        )


def _formats(source: Path | BinaryIO) -> list[str]:
    """The decoders to try. TGA files have no signature, so theirs is tried only for `.tga`."""
    is_tga = isinstance(source, Path) and source.suffix.lower() == ".tga"
    return [name for name in _FORMATS if name != "TGA" or is_tga]


def _turn(file: Image.Image) -> Image.Transpose | None:
    """The transpose for the EXIF orientation, or `None`; damaged EXIF is ignored, as in viewers."""
    try:
        return _TURNS.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return None


def _in_8_bits(file: Image.Image, mode: str) -> Image.Image:
    picture: Image.Image = file
    if file.mode.startswith("I"):  # Pillow gives 16-bit greys as integers of 16 or 32 bits
        values = np.asarray(file)
        if int(values.max()) > 65535 or int(values.min()) < 0:
            raise ValueError(f"must have 8 or 16 bits, found the value {values.max()}")
        # 65535 / 257 is 255.
        picture = Image.fromarray(np.round(values / 257.0).astype(np.uint8))
    elif file.mode == "F":
        raise ValueError("must have 8 or 16 bits, found floats")
    elif file.has_transparency_data:
        white = Image.new("RGBA", file.size, "white")
        picture = Image.alpha_composite(white, file.convert("RGBA"))
    elif file.mode not in {"L", "RGB"}:
        picture = file.convert("RGB")
    return picture.convert(mode)
