"""Arrays in numpy's `.npz` archives, read one by one after their sizes were checked."""

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

__all__ = ["ArrayHeader", "NpzFile", "open_npz"]

_MAX_ARRAYS = 1000
_MAX_RATIO = 200  # unpacked to packed, where it matters: arrays of numbers reach 10 or so
_RATIO_FREE = 2**26  # bytes, unpacked, that any ratio may have
_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class ArrayHeader(NamedTuple):
    """What an array says of itself."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]


class NpzFile:
    """An open archive; made by `open_npz`.

    Attributes:
        headers: Shape and type of every array by name, from the headers alone.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path, self._archive = path, archive
        entries = archive.infolist()
        self._entries = {entry.filename.removesuffix(".npy"): entry for entry in entries}
        # Entries that overlap are a way to unpack a small file to petabytes.
        packed = sum(entry.compress_size for entry in entries)
        if len(entries) > _MAX_ARRAYS or packed > path.stat().st_size:
            raise ValueError(f"{len(entries)} arrays of {packed} bytes")
        if len(self._entries) < len(entries):
            raise ValueError("two arrays of one name")
        for name, entry in self._entries.items():
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} packed otherwise than numpy packs")
            if entry.file_size > max(_RATIO_FREE, _MAX_RATIO * entry.compress_size):
                raise ValueError(f"{name} of {entry.file_size} bytes in {entry.compress_size}")
        self.headers = {name: self._header(name) for name in self._entries}

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def read(
        self, name: str, *, shape: Sequence[int | None], kinds: str = "iuf", finite: bool = False
    ) -> np.ndarray:
        """Read one array, in the byte order of this machine.

        Args:
            name: Of the array.
            shape: What its shape must be; `None` for any side.
            kinds: Letters of numpy's kinds that it may have: `iuf` for numbers, `U` for text.
            finite: Whether NaN and infinity are refused.

        Raises:
            FileError: If it is not there, or of another shape or type, or values are not finite.
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
            data = stream.read()  # at its end the stream compares the checksum
        array = np.frombuffer(data, found.dtype)
        array = array.reshape(found.shape, order="F" if found.fortran_order else "C")
        if finite and not np.isfinite(array).all():
            raise FileError(f"{self._path}: {name} must be finite, found a NaN or an infinity")
        return array.astype(found.dtype.newbyteorder("="))

    def number(self, name: str) -> int:
        """Read one whole number."""
        return int(self.read(name, shape=(), kinds="iu"))

    def text(self, name: str) -> str:
        """Read one piece of text."""
        text = str(self.read(name, shape=(), kinds="U").item())
        if any(ord(character) > sys.maxunicode for character in text):  # numpy does not check
            raise ValueError(f"no characters as {name}")
        return text

    @contextmanager
    def stream(self, name: str) -> Iterator[IO[bytes]]:
        """The values of an array as a stream of bytes."""
        with self._archive.open(self._entries[name]) as stream:
            _read_header(stream)
            yield stream

    def _header(self, name: str) -> ArrayHeader:
        """Read a header, and compare it with the size that the directory says."""
        entry = self._entries[name]
        with self._archive.open(entry) as stream:
            header = _read_header(stream)
            # What the header claims must be what the entry holds.
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
        FileError: If there is no such file, or it is damaged, holds pickles, or says that it holds
            more than it can; inside the `with` block too.
    """
    path = Path(path)
    try:
        # Opened here: zipfile leaves the file of a damaged archive open.
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            yield NpzFile(path, archive)
    except ConfigError:
        raise
    except Exception as error:  # what zipfile and numpy raise depends on where the damage is
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise FileError(f"{path}: must be a readable npz file, found {reason}") from error


def _read_header(stream: IO[bytes]) -> ArrayHeader:
    version = npy.read_magic(stream)
    if version not in _READERS:
        raise ValueError(f"an array of version {version}")
    return ArrayHeader(*_READERS[version](stream))
