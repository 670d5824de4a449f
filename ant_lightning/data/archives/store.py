"""A folder or a zip archive of numbered files with labels, as EDM's and EDM2's tools write them."""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ant_lightning.data.archives.index import ArchiveIndex, archive_index, bytes_at
from ant_lightning.errors import ConfigError, FileError, found_at

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

_COLUMNS = ("offset", "size", "method", "crc", "label")
_LABELS = "dataset.json"
_MAX_LABELS_BYTES = 2**30
_MAX_FILE_BYTES = 2**31
_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of name and extra field end the fixed part


class FileStore(Protocol):
    """Files in the order of their names.

    Attributes:
        labels: `[n]` int64; `None` if `dataset.json` has none.
        fingerprint: Identifies names and content.
    """

    labels: Tensor | None
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The content of a file."""


def open_store(path: str | Path, *, suffixes: Collection[str], setting: str = "path") -> FileStore:
    """Open a folder or an uncompressed zip archive, whose `dataset.json` has the labels.

    Args:
        path: Folder or zip archive.
        suffixes: Suffixes of the files that count, in lower case.
        setting: The argument that messages name.

    Raises:
        ConfigError: If there is nothing of that kind.
        FileError: If the archive or `dataset.json` is damaged, or lacks a file's label.
    """
    path = Path(path)
    store: FileStore
    if path.is_dir():
        store = _Folder(path, suffixes)
    elif path.is_file():
        store = _Zip(path, suffixes)
    else:
        raise ConfigError(f"{setting}: must be a folder or a zip archive, {found_at(path)}")
    if not len(store):
        kinds = " or ".join(sorted(suffixes))
        raise ConfigError(f"{setting}: must hold files of type {kinds}, found none in {path}")
    return store


class _Folder:
    def __init__(self, path: Path, suffixes: Collection[str]) -> None:
        files = [each for each in path.rglob("*") if each.suffix.lower() in suffixes]
        names = {each.relative_to(path).as_posix(): each for each in files}
        self._files = [names[name] for name in sorted(names)]
        content = path / _LABELS
        self.labels = None
        if content.is_file():
            if content.stat().st_size > _MAX_LABELS_BYTES:
                raise FileError(
                    f"{content}: must have at most {_MAX_LABELS_BYTES} bytes, "
                    f"found {content.stat().st_size}"
                )
            self.labels = _labels(content, content.read_bytes(), sorted(names))
        digest = hashlib.sha256()
        for name in sorted(names):
            found = names[name].stat()
            digest.update(f"{name}\0{found.st_size} {found.st_mtime_ns};".encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        return self._files[index].read_bytes()


class _Zip:
    """Reads members by their place in the archive; Python's own reader would keep all names."""

    def __init__(self, path: Path, suffixes: Collection[str]) -> None:
        self._path, self._suffixes = path, suffixes
        settings = {"kind": "zip", "suffixes": sorted(suffixes)}
        index = archive_index(path, self._built, columns=_COLUMNS, settings=settings)
        self._columns, self.fingerprint = index
        labels = self._columns["label"]
        self.labels = labels if len(labels) and int(labels.min()) >= 0 else None

    def __len__(self) -> int:
        return len(self._columns["offset"])

    def read(self, index: int) -> bytes:
        offset, size, method, crc = (int(self._columns[name][index]) for name in _COLUMNS[:4])
        header = bytes_at(self._path, offset, _LOCAL_HEADER.size)
        content = bytes_at(
            self._path, offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header)), size
        )
        try:
            if method == zipfile.ZIP_DEFLATED:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, _MAX_FILE_BYTES)
            if zlib.crc32(content) != crc:
                raise zlib.error("its checksum differs")
        except zlib.error as error:
            raise FileError(f"{self._path}: file {index} is damaged ({error})") from error
        return content

    def _built(self) -> ArchiveIndex:
        labels = None
        try:
            with zipfile.ZipFile(self._path) as archive:
                members = [
                    each
                    for each in archive.infolist()
                    if Path(each.filename).suffix.lower() in self._suffixes
                ]
                members.sort(key=lambda member: member.filename)
                names = [each.filename for each in members]
                if _LABELS in archive.namelist():
                    size = archive.getinfo(_LABELS).file_size
                    content = archive.read(_LABELS) if size <= _MAX_LABELS_BYTES else b""
                    labels = _labels(self._path / _LABELS, content, names)
        except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
            raise FileError(f"{self._path}: must be a zip archive, found {error}") from error
        for each in members:
            plain = each.compress_type in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
            if not plain or each.flag_bits & 1:  # bit 0: encrypted
                raise FileError(
                    f"{self._path}: files must be stored or deflated, found {each.filename}"
                )
        rows = [(m.header_offset, m.compress_size, m.compress_type, m.CRC) for m in members]
        digest = hashlib.sha256()
        for each in members:
            digest.update(f"{each.filename}\0{each.file_size} {each.CRC};".encode())
        table = torch.tensor(rows, dtype=torch.int64).view(-1, len(_COLUMNS) - 1)
        columns = {name: table[:, i].contiguous() for i, name in enumerate(_COLUMNS[:-1])}
        none = torch.full((len(members),), -1)
        return ArchiveIndex(
            {**columns, "label": none if labels is None else labels}, digest.hexdigest()
        )


def _labels(path: Path, content: bytes, names: list[str]) -> Tensor | None:
    """The labels of `dataset.json`, `{"labels": [[name, label], ..]}`, in the order of `names`."""
    try:
        found: Any = json.loads(content)["labels"]
        if found is None:
            return None
        by_name = dict(found)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(
            f"{path}: must hold labels as [[name, label], ...], found {error!r:.80}"
        ) from error
    labels = [by_name.get(name) for name in names]
    for name, label in zip(names, labels, strict=True):
        if type(label) is not int or not 0 <= label < 2**62:
            raise FileError(
                f"{path}: every file must have a whole number as label, found {label!r:.40} for "
                f"{name}"
            )
    return torch.tensor(labels, dtype=torch.int64)
