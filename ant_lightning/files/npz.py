"""Reads numpy's `.npz` archives one array at a time, after checking the sizes they claim."""

from __future__ import annotations

import math
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from ant_lightning.errors import ConfigError, FileError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MAX_ARRAYS = 1000
# Unpacked size of an array over its packed size; real numbers reach 10 or so.
_MAX_RATIO = 200
# Up to this many unpacked bytes, any ratio is allowed: constant arrays pack well, and do no harm.
_RATIO_FREE = 2**26
# They parse a header without reserving memory for the values. Version 3 of the format only adds
# field names in UTF-8, and arrays with fields are refused anyway.
_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class ArrayHeader(NamedTuple):
    """The header of a stored array."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]


class NpzFile:
    """An open archive; use `open_npz` to make one.

    Its methods raise `ValueError` where the archive is damaged; `open_npz` turns that into a
    `FileError` with the path.

    Attributes:
        headers: Header of every array by name: shape, order and dtype, without the values.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path, self._archive = path, archive
        entries = archive.infolist()
        self._entries = {entry.filename.removesuffix(".npy"): entry for entry in entries}
        # Overlapping entries can make a small file unpack to petabytes. Their packed sizes then add
        # up to more than the file has.
        packed = sum(entry.compress_size for entry in entries)
        if len(entries) > _MAX_ARRAYS or packed > path.stat().st_size:
            raise ValueError(f"{len(entries)} arrays of {packed} bytes")
        if len(self._entries) < len(entries):
            raise ValueError("two arrays of one name")
        for name, entry in self._entries.items():
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name}, which is not packed as numpy packs")
            if entry.file_size > max(_RATIO_FREE, _MAX_RATIO * entry.compress_size):
                raise ValueError(f"{name} of {entry.file_size} bytes in {entry.compress_size}")
        self.headers = {name: self._header(name) for name in self._entries}

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def read(
        self, name: str, *, shape: Sequence[int | None], kinds: str = "iuf", finite: bool = False
    ) -> np.ndarray:
        """Read one array, converted to the byte order of this machine.

        Args:
            name: Name of the array.
            shape: The shape that it must have; `None` stands for a side of any length.
            kinds: Letters of the numpy kinds that it may have: `iuf` for numbers, `U` for text.
            finite: Whether NaN and infinity are refused.

        Raises:
            FileError: If there is no such array, if its shape or kind is another, or if `finite` is
                violated.
        """
        found = self.headers.get(name)
        if (
            found is None
            or found.dtype.kind not in kinds
            or len(found.shape) != len(shape)
            or any(side not in {None, n} for side, n in zip(shape, found.shape, strict=True))
        ):
            sides = ", ".join("n" if side is None else str(side) for side in shape)
            what = f"{found.dtype} of shape {list(found.shape)}" if found else "nothing"
            raise FileError(
                f"{self._path}: must hold {name} of kind {kinds} and shape [{sides}], found {what}"
            )
        with self.stream(name) as stream:
            data = stream.read()  # to the end, where zipfile compares the checksum
        array = np.frombuffer(data, found.dtype)
        array = array.reshape(found.shape, order="F" if found.fortran_order else "C")
        if finite and not np.isfinite(array).all():
            raise FileError(f"{self._path}: {name} must be finite, found a NaN or an infinity")
        return array.astype(found.dtype.newbyteorder("="))

    def number(self, name: str) -> int:
        """Read an array that is a single integer."""
        return int(self.read(name, shape=(), kinds="iu"))

    def text(self, name: str) -> str:
        """Read an array that is a single string."""
        text = str(self.read(name, shape=(), kinds="U").item())
        if any(ord(character) > sys.maxunicode for character in text):  # numpy does not check
            raise ValueError(f"no characters as {name}")
        return text

    @contextmanager
    def stream(self, name: str) -> Iterator[IO[bytes]]:
        """Open the values of an array as a stream of bytes, after the header."""
        with self._archive.open(self._entries[name]) as stream:
            _read_header(stream)
            yield stream

    def _header(self, name: str) -> ArrayHeader:
        """Read the header of an array, and check it against the archive's directory."""
        entry = self._entries[name]
        with self._archive.open(entry) as stream:
            header = _read_header(stream)
            # The size by the header is computed in Python's integers, which cannot overflow.
            size = stream.tell() + math.prod(header.shape) * header.dtype.itemsize
        if header.dtype.kind not in "biufU" or min(header.shape, default=0) < 0:
            raise ValueError(f"{name} of {header.dtype}, shape {header.shape}: no plain numbers")
        if size != entry.file_size:
            raise ValueError(f"{name} of {entry.file_size} bytes, {size} bytes by its header")
        return header


@contextmanager
def open_npz(path: str | Path) -> Iterator[NpzFile]:
    """Open an archive of plain arrays; only headers are read until an array is asked for.

    Raises:
        FileError: If there is no such file, or if it is damaged, holds pickles, or claims more than
            it can hold. Errors inside the `with` block are turned into this one too.
    """
    path = Path(path)
    try:
        # Opened here, because zipfile would leave the file of a damaged archive open.
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            yield NpzFile(path, archive)
    except ConfigError:
        raise
    except Exception as error:  # zipfile and numpy raise many types, depending on the damage
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise FileError(f"{path}: must be a readable npz file, found {reason}") from error


def _read_header(stream: IO[bytes]) -> ArrayHeader:
    version = npy.read_magic(stream)
    if version not in _READERS:
        raise ValueError(f"an array of version {version}")
    return ArrayHeader(*_READERS[version](stream))
