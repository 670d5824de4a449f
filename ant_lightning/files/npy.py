"""Arrays in numpy's `.npy` format: the header, strictly, and arrays mapped into memory."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from ant_lightning.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ArrayHeader", "map_npy", "read_header", "shape_fits"]

_MAX_HEADER = 10_000  # bytes, numpy's own bound
_MAX_DIMENSIONS = 16
# Numbers and text of fixed size. Python objects, records, dates and raw bytes are none of ours.
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|U\d{1,6})")
_LENGTHS = {(1, 0): 2, (2, 0): 4, (3, 0): 4}


@dataclass(frozen=True)
class ArrayHeader:
    """What an array says of itself.

    Attributes:
        shape: Its sides, each at least 0.
        dtype: Numbers or text of fixed size.
        fortran_order: Whether the first index runs fastest.
        offset: Bytes before the values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes]) -> ArrayHeader:
    """Read the header of an open `.npy` stream, at most 10 kB, and leave the stream behind it.

    Raises:
        ValueError: With what is wrong: no such header, objects, an impossible shape.
    """
    magic = stream.read(8)
    length_bytes = _LENGTHS.get((magic[6], magic[7]), 0) if len(magic) == 8 else 0
    if magic[:6] != b"\x93NUMPY" or not length_bytes:
        raise ValueError("no npy array of version 1 to 3")
    length = int.from_bytes(stream.read(length_bytes), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"an npy header of {length} bytes")
    text = stream.read(length).decode("latin1" if magic[6] < 3 else "utf8")
    try:
        content = ast.literal_eval(text.strip())
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("a malformed npy header") from error
    if not isinstance(content, dict) or set(content) != {"descr", "fortran_order", "shape"}:
        raise ValueError("an npy header without descr, fortran_order and shape")
    descr, shape, fortran_order = content["descr"], content["shape"], content["fortran_order"]
    if not isinstance(descr, str) or not _DTYPE.fullmatch(descr):
        raise ValueError(
            f"dtype {str(descr)[:40]!r}, and an array must be plain numbers or text (no pickle)"
        )
    if not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError("a shape that is no short tuple")
    if any(type(side) is not int or not 0 <= side < 2**63 for side in shape):
        raise ValueError(f"the impossible shape {str(shape)[:60]}")
    offset = 8 + length_bytes + length
    return ArrayHeader(shape, np.dtype(descr), bool(fortran_order), offset)


def shape_fits(found: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Whether each side is as wanted; None stands for any."""
    return len(found) == len(wanted) and all(
        side in {None, other} for side, other in zip(wanted, found, strict=True)
    )


def map_npy(
    path: Path, *, shape: Sequence[int], dtype: np.dtype, setting: str, hint: str = ""
) -> np.ndarray:
    """Map an `.npy` file of known shape and type into memory, read-only.

    Args:
        path: The file.
        shape: The shape it must have.
        dtype: The type it must have.
        setting: What a message begins with.
        hint: What a message ends with: what to do.

    Raises:
        FileError: If it is missing, damaged, or holds something else or less.
    """
    after = f"; {hint}" if hint else ""
    try:
        with path.open("rb") as file:
            header = read_header(file)
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise FileError(
            f"{setting}: {path} is missing, truncated or damaged ({error}){after}"
        ) from error
    if (header.shape, header.dtype, header.fortran_order) != (tuple(shape), dtype, False):
        raise FileError(
            f"{setting}: {path} must hold {dtype} of shape {list(shape)}, found {header.dtype} of "
            f"shape {list(header.shape)}{after}"
        )
    if size != header.offset + header.nbytes:
        raise FileError(
            f"{setting}: {path} is truncated or damaged, it must have "
            f"{header.offset + header.nbytes} bytes, found {size}{after}"
        )
    if not header.nbytes:
        return np.empty(header.shape, dtype)
    return np.memmap(path, dtype, mode="r", offset=header.offset, shape=header.shape)
