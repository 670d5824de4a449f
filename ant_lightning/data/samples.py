"""What one sample of any data set holds: an image and a label, in the form that training takes."""

from __future__ import annotations

import random
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ant_lightning.data.pictures import (
    GREY_MODES,
    Crop,
    decoded_picture,
    fitted_pixels,
    is_grey,
    open_picture,
)
from ant_lightning.errors import ConfigError
from ant_lightning.randomness import keyed_seed
from ant_lightning.sizes import Size, height_and_width

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

Key = str | int | None
_IMAGE_NAMES = ("image", "img", "images", "pixel_values")
_LABEL_NAMES = ("label", "labels", "target", "class", "cls", "fine_label")


def image_of(sample: Any, key: Key = None) -> Any:  # noqa: ANN401 - samples of all kinds
    """The image of a sample: that of `key`, or by default the one whose name or place says so.

    Raises:
        ConfigError: If the sample has no such entry.
    """
    if key is None and isinstance(sample, dict):
        key = next((name for name in _IMAGE_NAMES if name in sample), None)
        if key is None:
            raise ConfigError(
                f"image: must name the entry with the image, found none called "
                f"{' or '.join(_IMAGE_NAMES)} among {', '.join(map(str, sample))}"
            )
    elif key is None:
        return sample[0] if isinstance(sample, tuple | list) else sample
    return _entry(sample, key, "image")


def label_of(sample: Any, key: Key = None) -> int | None:  # noqa: ANN401
    """The label of a sample: that of `key`, or by default the one whose name or place says so.

    Raises:
        ConfigError: If there is no such entry, or it is no whole number.
    """
    key = label_key(sample, key)
    if key is None:
        return None
    label = _entry(sample, key, "label")
    value = label.item() if hasattr(label, "item") and np.ndim(label) == 0 else label
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(
            f"label: must be a whole number, found {str(value)[:60]!r} in {key!r}; num_classes: 0 "
            "ignores labels"
        )
    return value


def label_key(sample: Any, key: Key = None) -> Key:  # noqa: ANN401
    """Name or place of the label in a sample: `key`, or what says so by itself; `None` for none."""
    if key is None and isinstance(sample, dict):
        return next((name for name in _LABEL_NAMES if name in sample), None)
    if key is None and isinstance(sample, tuple | list) and len(sample) > 1:
        return 1
    return key


def num_channels(image: Any) -> int:  # noqa: ANN401
    """Channels of an image: 1 for a grey picture, 3 for any other; those of a tensor or array."""
    content = _encoded(image)
    if content is not None:  # decoded, all have three
        return 1 if is_grey(BytesIO(content)) else 3
    picture = _opened(image)
    if isinstance(picture, Image.Image):
        return 1 if picture.mode in GREY_MODES else 3
    return 3 if len(picture) == 4 and picture.dtype == torch.uint8 else len(picture)


def training_image(
    image: Any,  # noqa: ANN401
    *,
    channels: int,
    image_size: Size | None,
    crop: Crop,
    value_range: tuple[float, float],
) -> Tensor:
    """An image as a float32 tensor `[c, h, w]` in [-1, 1].

    Pictures, encoded bytes and uint8 values are cropped and resized as files are. Floating-point
    images are taken as they are: `value_range` becomes [-1, 1].

    Args:
        image: A PIL image, encoded bytes, or an array or tensor, `[h, w]`, `[h, w, c]` or
            `[c, h, w]`. The end with 1, 3, 4 or `channels` entries is that of the channels; if
            both have, the last one of an array, the first one of a tensor.
        channels: Channels wanted. Transparent pictures and uint8 images of 4 channels are
            composited on white.
        image_size: Height and width wanted, one number for a square; `None` keeps the size.
        crop: See `read_picture`.
        value_range: What floats run from and to.

    Raises:
        ConfigError: If it is no image, or floats have another size or lie outside of `value_range`.
        FileError: If it cannot be decoded.
    """
    opened = _opened(image, channels)
    if not isinstance(opened, Image.Image) and opened.is_floating_point():
        return _rescaled(opened, channels=channels, size=image_size, value_range=value_range)
    if not isinstance(opened, Image.Image):
        if opened.dtype != torch.uint8:
            raise ConfigError(f"image: must be uint8 or floating point, found {opened.dtype}")
        if len(opened) not in {1, 3, 4}:
            raise ConfigError(f"image: uint8 must have 1, 3 or 4 channels, found {len(opened)}")
        opened = Image.fromarray(opened.permute(1, 2, 0).squeeze(-1).numpy())
    if channels not in {1, 3}:
        raise ConfigError(
            f"channels: must be 1 or 3 for pictures and uint8 images, found {channels}"
        )
    picture = decoded_picture(opened, channels=channels)
    if image_size is None:
        pixels = np.asarray(picture).reshape(picture.height, picture.width, channels)
    else:
        pixels = fitted_pixels(picture, image_size=image_size, crop=crop)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 127.5 - 1


@contextmanager
def keyed_libraries(seed: int, stream: str, *keys: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and PyTorch by keys, and restore them after.

    A transform that draws from them then depends on the keys alone, and disturbs nothing else.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    value = keyed_seed(seed, stream, *keys)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _entry(sample: Any, key: str | int, what: str) -> Any:  # noqa: ANN401
    try:
        return sample[key]
    except (KeyError, IndexError, TypeError) as error:
        kinds = ", ".join(map(str, sample)) if isinstance(sample, dict) else type(sample).__name__
        raise ConfigError(
            f"{what}: must name an entry of a sample, found {key!r}, not in {kinds}"
        ) from error


def _encoded(image: Any) -> bytes | None:  # noqa: ANN401
    """The encoded bytes of an image, `None` if it is decoded."""
    if isinstance(image, dict):  # undecoded, as in parquet files
        image = image.get("bytes")
    return image if isinstance(image, bytes) else None


def _opened(image: Any, channels: int | None = None) -> Image.Image | Tensor:  # noqa: ANN401
    """The image as a PIL image, or as a tensor `[c, h, w]`."""
    content = _encoded(image)
    if content is not None:
        return open_picture(BytesIO(content), channels=3)
    if isinstance(image, Image.Image):
        return image
    is_array = isinstance(image, np.ndarray)
    if is_array:
        image = torch.from_numpy(np.ascontiguousarray(image))
    if not isinstance(image, torch.Tensor) or image.ndim not in {2, 3}:
        shape = f" of shape {list(image.shape)}" if hasattr(image, "shape") else ""
        raise ConfigError(
            "image: must be a PIL image, an array [h, w] or [h, w, c], a tensor [c, h, w] or "
            f"encoded bytes, found {type(image).__name__}{shape}"
        )
    if image.ndim == 2:
        return image[None]
    known = {1, 3, 4, channels}
    first, last = image.shape[0] in known, image.shape[-1] in known
    if not first and not last:
        raise ConfigError(
            "image: must have 1, 3 or 4 channels as its first or its last dimension (or as many as "
            f"channels says), found the shape {list(image.shape)}"
        )
    return image.movedim(-1, 0) if last and (is_array or not first) else image


def _rescaled(
    image: Tensor, *, channels: int, size: Size | None, value_range: tuple[float, float]
) -> Tensor:
    low, high = value_range
    both = tuple(image.shape[1:]) if size is None else height_and_width(size, name="image_size")
    if tuple(image.shape[1:]) != both or len(image) != channels:
        raise ConfigError(
            "image_size: floating-point images are not resized and must be "
            f"{[channels, *both]}, found {list(image.shape)}; return uint8 or PIL images to have "
            "them resized"
        )
    least, most = float(image.min()), float(image.max())
    margin = 1e-4 * (high - low)  # an interpolation may overshoot in the last bits
    if not low - margin <= least <= most <= high + margin:
        raise ConfigError(
            f"value_range: floating-point images must lie in [{low}, {high}], found values from "
            f"{least} to {most}"
        )
    return (image.float() - low) / (high - low) * 2 - 1
