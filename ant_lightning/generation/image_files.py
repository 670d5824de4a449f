"""Batches of images from the ADM evaluator's npz files (`arr_0`), read without loading them all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.npz import open_npz

__all__ = ["image_batches", "num_images"]

_MAX_SIDE = 2**14


def image_batches(path: str | Path, *, batch_size: int = 100) -> Iterator[Tensor]:
    """Yield uint8 batches ``[b, c, h, w]`` from the array ``arr_0`` of an npz file.

    ``arr_0`` is uint8 ``[n, h, w, c]`` with 1 or 3 channels, or grey ``[n, h, w]``. It is read
    as a stream: 50,000 images of 256 x 256 are 10 GB.

    Raises:
        ConfigError: ``batch_size`` is below 1.
        FileError: No such file or array, another dtype (16-bit images) or shape, or the file
            ends early.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    with open_npz(path) as file:
        header = file.headers.get("arr_0")
        if header is None:
            raise FileError(f"{path} must hold an array arr_0 of images, it holds none")
        shape = header.shape
        if header.dtype != np.uint8:
            raise FileError(f"arr_0 of {path} must be uint8 images (8 bits), got {header.dtype}")
        if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
            raise FileError(
                f"arr_0 of {path} must have shape [n, h, w] or [n, h, w, c] with 1 or 3 channels, "
                f"got {list(shape)}"
            )
        height, width, channels = (*shape[1:], 1)[:3]
        if header.fortran_order or not (1 <= height <= _MAX_SIDE and 1 <= width <= _MAX_SIDE):
            raise FileError(
                f"arr_0 of {path} must be in C order with sides of 1 to {_MAX_SIDE}, got "
                f"{list(shape)}"
            )
        image_bytes = height * width * channels
        with file.stream("arr_0") as stream:
            for start in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - start)
                with file.reading():
                    data = stream.read(count * image_bytes)
                if len(data) != count * image_bytes:
                    raise FileError(f"arr_0 of {path} must hold {shape[0]} images, it ends early")
                batch = np.frombuffer(data, dtype=np.uint8).reshape(count, height, width, channels)
                yield torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())


def num_images(path: str | Path) -> int:
    """How many images ``arr_0`` of an npz file holds, from its header; 0 without such an array.

    Raises:
        FileError: No such file, or no npz file of plain arrays.
    """
    with open_npz(path) as file:
        header = file.headers.get("arr_0")
        return header.shape[0] if header and header.shape else 0
