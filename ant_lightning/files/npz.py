"""Arrays in numpy's `.npz` archives, read one by one after their sizes were checked."""

from __future__ import annotations

import struct
import zipfile
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import numpy as np

from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.npy import ArrayHeader, read_header, shape_fits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["NpzFile", "open_npz"]

_MAX_ARRAYS = 1000
_MAX_RATIO = 200  # unpacked to packed, where it matters: arrays of numbers reach 10 or so
_RATIO_FREE = 2**26  # bytes, unpacked, that any ratio may have
_CHUNK = 2**20
_LAST_CHARACTER = 0x10FFFF
# What zipfile raises for damage depends on where it is.
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,  # NotImplementedError is one
    OverflowError,
    LookupError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


class NpzFile:
    """An open archive; made by `open_npz`.

    Attributes:
        path: The file.
        headers: Shape and type of every array by name, from the headers alone.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, *, setting: str) -> None:
        self.path = path
        self._archive = archive
        self._setting = f"{setting}: " if setting else ""
        self._entries = self._checked_entries()
        self.headers = {name: self._header(name) for name in self._entries}

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def check(self, name: str, *, shape: Sequence[int | None], kinds: str = "iuf") -> ArrayHeader:
        """The header of an array that must be there; nothing is read.

        Args:
            name: Of the array.
            shape: What its shape must be; None for any side.
            kinds: Letters of numpy's kinds that it may have: `iuf` for numbers, `U` for text.

        Raises:
            FileError: If it is not there, or of another shape or type.
        """
        header = self.headers.get(name)
        if header is None:
            raise self.error(f"must hold the array {name}, it holds {sorted(self.headers)[:20]}")
        if header.dtype.kind not in kinds or not shape_fits(header.shape, shape):
            words = {"iuf": "numbers", "iu": "integers", "i": "integers", "U": "text"}
            sides = ", ".join("n" if side is None else str(side) for side in shape)
            raise self.error(
                f"must hold {words.get(kinds, kinds)} of shape [{sides}] as {name}, found "
                f"{header.dtype} of shape {list(header.shape)}"
            )
        return header

    def read(
        self,
        name: str,
        *,
        shape: Sequence[int | None],
        kinds: str = "iuf",
        finite: bool = False,
    ) -> np.ndarray:
        """Read one array, in the byte order of this machine.

        Args:
            name: Of the array.
            shape: As for `check`.
            kinds: As for `check`.
            finite: Whether NaN and infinity are refused.

        Raises:
            FileError: As `check`, or if the values are damaged, or not finite.
        """
        header = self.check(name, shape=shape, kinds=kinds)
        raw = np.empty(header.nbytes, dtype=np.uint8)
        with self.reading(), self.stream(name) as stream:
            for start in range(0, header.nbytes, _CHUNK):
                part = stream.read(min(_CHUNK, header.nbytes - start))
                raw[start : start + len(part)] = np.frombuffer(part, dtype=np.uint8)
                if len(part) < min(_CHUNK, header.nbytes - start):
                    raise ValueError(f"{name} ends early")
            stream.read(1)  # at its end the stream compares the checksum
            order: Literal["F", "C"] = "F" if header.fortran_order else "C"
            array: np.ndarray = raw.view(header.dtype).reshape(header.shape, order=order)
            if header.dtype.kind == "U":
                codes = raw.view(np.dtype(np.uint32).newbyteorder(header.dtype.byteorder))
                if (codes > _LAST_CHARACTER).any():
                    raise ValueError(f"{name} has what is no character")
        if finite and not np.isfinite(array).all():
            raise self.error(f"must hold finite numbers as {name}, found a NaN or an infinity")
        native: np.ndarray = array.astype(header.dtype.newbyteorder("="), copy=False)
        return native

    def number(self, name: str) -> int:
        """Read one whole number."""
        return int(self.read(name, shape=(), kinds="iu"))

    def text(self, name: str) -> str:
        """Read one piece of text."""
        return str(self.read(name, shape=(), kinds="U"))

    @contextmanager
    def stream(self, name: str) -> Iterator[IO[bytes]]:
        """The values of an array as a stream of bytes; use it inside `reading`."""
        with self._archive.open(self._entries[name]) as stream:
            read_header(stream)
            yield stream

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, damage to the file becomes a `FileError`."""
        try:
            yield
        except ConfigError:
            raise
        except _DAMAGE as error:
            raise self.error(f"must be a readable npz file: {error or type(error).__name__}") from (
                error
            )

    def error(self, finding: str) -> FileError:
        """The error that names this file."""
        return FileError(f"{self._setting}{self.path} {finding}")

    def _checked_entries(self) -> dict[str, zipfile.ZipInfo]:
        """The entries by name, of a directory that says nothing impossible."""
        entries = self._archive.infolist()
        if len(entries) > _MAX_ARRAYS:
            raise self.error(f"must hold at most {_MAX_ARRAYS} arrays, found {len(entries)}")
        if sum(entry.compress_size for entry in entries) > self.path.stat().st_size:
            raise self.error("must be as long as its directory says, its entries overlap")
        by_name = {entry.filename.removesuffix(".npy"): entry for entry in entries}
        if len(by_name) < len(entries):
            raise self.error("must hold each array once, found two of one name")
        for name, entry in by_name.items():
            packed, unpacked = entry.compress_size, entry.file_size
            stored = entry.compress_type == zipfile.ZIP_STORED
            if not stored and entry.compress_type != zipfile.ZIP_DEFLATED:
                raise self.error(f"must be packed as numpy packs, {name} is packed otherwise")
            if (stored and packed != unpacked) or (
                unpacked > _RATIO_FREE and unpacked > _MAX_RATIO * packed
            ):
                raise self.error(
                    f"must not unpack to more than {_MAX_RATIO} times its size, {name} says "
                    f"{unpacked} bytes from {packed}"
                )
        return by_name

    def _header(self, name: str) -> ArrayHeader:
        """Read a header, and compare it with the size that the directory says."""
        entry = self._entries[name]
        with self._archive.open(entry) as stream:
            try:
                header = read_header(stream)
            except ValueError as error:
                raise self.error(f"must be a readable npz file: {name} has {error}") from error
        size = header.offset + header.nbytes
        if size != entry.file_size:
            raise self.error(
                f"is damaged: {name} must be {size} bytes by its header, it has {entry.file_size}"
            )
        return header


@contextmanager
def open_npz(path: str | Path, *, setting: str = "") -> Iterator[NpzFile]:
    """Open an archive of plain arrays; only headers are read until an array is asked for.

    Args:
        path: The file.
        setting: What a message begins with.

    Raises:
        FileError: No such file, no archive of plain arrays, or one whose entries say more than the
            file can hold.
    """
    path = Path(path)
    with ExitStack() as stack:
        try:
            # Opened here: zipfile leaves the file of a damaged archive open.
            raw = stack.enter_context(path.open("rb"))
            archive = stack.enter_context(zipfile.ZipFile(raw))
            file = NpzFile(path, archive, setting=setting)
        except FileError:
            raise
        except _DAMAGE as error:
            before = f"{setting}: " if setting else ""
            raise FileError(f"{before}{path} must be a readable npz file: {error}") from error
        yield file
