"""Batches of images from the ADM evaluator's npz files (`arr_0`), read without loading them all."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ant_lightning.errors import ConfigError

__all__ = ["image_batches", "npz_shapes"]


def image_batches(path: str | Path, *, batch_size: int = 100) -> Iterator[Tensor]:
    """Yield uint8 batches ``[b, c, h, w]`` from the array ``arr_0`` of an npz file.

    ``arr_0`` is uint8 ``[n, h, w, c]`` with 1 or 3 channels, or grey ``[n, h, w]``. It is read
    as a stream: 50,000 images of 256 x 256 are 10 GB.

    Raises:
        ConfigError: No such file or array, another dtype (16-bit images) or shape, or the file
            ends early.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    shape, dtype = npz_shapes(path).get("arr_0", ((), None))
    if dtype is None:
        raise ConfigError(f"{path} must hold an array arr_0 of images, it holds none")
    if dtype != np.uint8:
        raise ConfigError(f"arr_0 of {path} must be uint8 images (8 bits), got {dtype}")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        raise ConfigError(
            f"arr_0 of {path} must have shape [n, h, w] or [n, h, w, c] with 1 or 3 channels, "
            f"got {list(shape)}"
        )
    height, width, channels = (*shape[1:], 1)[:3]
    image_bytes = height * width * channels
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        _read_header(stream)
        for start in range(0, shape[0], batch_size):
            count = min(batch_size, shape[0] - start)
            data = stream.read(count * image_bytes)
            if len(data) != count * image_bytes:
                raise ConfigError(f"arr_0 of {path} must hold {shape[0]} images, it ends early")
            batch = np.frombuffer(data, dtype=np.uint8).reshape(count, height, width, channels)
            yield torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())


def npz_shapes(path: str | Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every array of an npz file, from the headers alone.

    Raises:
        ConfigError: No such file, no npz file, an array in Fortran order or of Python objects, or
            an array whose data are not as long as its header says.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as stream:
                    shape, fortran_order, dtype = _read_header(stream)
                    size = stream.tell() + math.prod(shape) * dtype.itemsize
                name = entry.filename.removesuffix(".npy")
                if dtype.hasobject or (fortran_order and len(shape) > 2):
                    raise ConfigError(f"{name} of {path} must be plain numbers in C order")
                if size != entry.file_size:
                    raise ConfigError(
                        f"{name} of {path} must be {size} bytes by its header, it has "
                        f"{entry.file_size}"
                    )
                found[name] = (tuple(shape), dtype)
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} must be a readable npz file: {error}") from error
    return found


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype of the array that the open npy stream holds."""
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ConfigError(f"npy data must have version 1.0 or 2.0, got {version}")
    return read(stream)
