"""Tar shards in WebDataset's format as a map-style data set."""

from __future__ import annotations

import hashlib
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ant_lightning.data.archives.entries import image_entry, label_of_entries
from ant_lightning.data.archives.index import ArchiveIndex, archive_index, bytes_at
from ant_lightning.data.archives.shard_names import shard_files
from ant_lightning.errors import ConfigError, FileError

_COLUMNS = ("offset", "size", "label")
_NO_LABEL = -1


class TarShards(Dataset[dict[str, Any]]):
    """Tar files in WebDataset's format, with random access, for `MapStyleData`.

    A sample is the files of a shard with one name up to its first dot: `0001.jpg`, `0001.cls`.
    Headers are read once into an index (see `archive_index`), which is made anew if a shard
    changes; no image is decoded for it. Samples are then read wherever they lie, so every sample
    comes once an epoch in one random order over all shards, and a run resumes bit for bit.

    Args:
        shards: The files: paths, patterns (`data/*.tar`) or ranges (`data/{0000..0099}.tar`).
        image: What follows the first dot in the name of an image; by default the only entry of a
            sample whose suffix is that of an image.
        label: What follows the first dot in the name of a label: `cls`, a file with a whole number,
            or `json:ENTRY`, an entry of a JSON file. By default `cls` where samples have one.

    Attributes:
        num_classes: The largest label plus one; `None` without labels.
        fingerprint: Identifies the names, sizes and times of all files in the shards.

    Raises:
        ConfigError: If there are no shards.
        FileError: If a shard is compressed, damaged, or a sample lacks an entry.

    Examples:
        With `--data.dataset` of the command line, `{class_path: ant_lightning.TarShards, init_args:
        {shards: 'data/{0000..0099}.tar'}}`.

        >>> import io, tarfile, tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from ant_lightning import MapStyleData, TarShards
        >>> def add(tar, name, content):
        ...     member = tarfile.TarInfo(name)
        ...     member.size = len(content)
        ...     tar.addfile(member, io.BytesIO(content))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with tarfile.open(f"{folder}/0.tar", "w") as tar:
        ...         for i in range(10):
        ...             Image.new("RGB", (8, 8), (i, 0, 0)).save(f"{folder}/image.png")
        ...             add(tar, f"{i:04}.png", Path(f"{folder}/image.png").read_bytes())
        ...             add(tar, f"{i:04}.cls", str(i % 3).encode())
        ...     data = MapStyleData(TarShards(f"{folder}/*.tar"), batch_size=4, num_workers=0)
        ...     batch = data.train_images.load([0, 1], epoch=None)
        >>> batch.images.shape, data.num_classes
        (torch.Size([2, 3, 8, 8]), 3)
    """

    def __init__(
        self, shards: str | list[str], *, image: str | None = None, label: str | None = None
    ) -> None:
        self.shards = shard_files(shards)
        self._image, self._label = image, label
        with ThreadPoolExecutor() as pool:  # a shard's headers are many small reads
            self._indices = list(pool.map(self._index, self.shards))
        counts = torch.tensor([len(each.columns["offset"]) for each in self._indices])
        self._ends = counts.cumsum(0)
        labels = [each.columns["label"] for each in self._indices if len(each.columns["label"])]
        most = max((int(each.max()) for each in labels), default=_NO_LABEL)
        least = min((int(each.min()) for each in labels), default=_NO_LABEL)
        if least == _NO_LABEL < most:
            raise ConfigError("label: every sample must have one or none, found both")
        self.num_classes = most + 1 if most > _NO_LABEL else None

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102 - described above
        digests = "".join(each.digest for each in self._indices)
        return hashlib.sha256(digests.encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(torch.searchsorted(self._ends, index, right=True))
        columns = self._indices[number].columns
        row = index - int(self._ends[number])  # from the end of the shard, below 0
        offset, size, label = (int(columns[name][row]) for name in _COLUMNS)
        sample: dict[str, Any] = {"image": bytes_at(self.shards[number], offset, size)}
        return sample if label == _NO_LABEL else {**sample, "label": label}

    def _index(self, shard: Path) -> ArchiveIndex:
        settings = {"kind": "tar", "image": self._image, "label": self._label}
        return archive_index(shard, lambda: self._built(shard), columns=_COLUMNS, settings=settings)

    def _built(self, shard: Path) -> ArchiveIndex:
        """Read all headers of a shard, and the content of its labels."""
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        digest, size = hashlib.sha256(), shard.stat().st_size
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined] # or all headers are kept
                    digest.update(f"{member.name}\0{member.size} {member.mtime};".encode())
                    folder, _, name = member.name.rpartition("/")
                    key, _, extension = name.partition(".")
                    if not member.isreg() or name.startswith("__"):
                        continue
                    if member.offset_data + member.size > size or member.issparse():
                        raise tarfile.ReadError(f"{member.name} is truncated or sparse")
                    entries = samples.setdefault(f"{folder}/{key}", {})
                    if extension.lower() in entries:
                        raise tarfile.ReadError(f"{member.name} occurs twice")
                    entries[extension.lower()] = (member.offset_data, member.size)
        except (tarfile.TarError, UnicodeError, ValueError, OSError) as error:
            raise FileError(
                f"{shard}: must be a whole, uncompressed tar file, found {error}"
            ) from error
        rows = [self._row(shard, key, entries) for key, entries in samples.items()]
        table = torch.tensor(rows, dtype=torch.int64).view(-1, len(_COLUMNS))
        columns = {name: table[:, i].contiguous() for i, name in enumerate(_COLUMNS)}
        return ArchiveIndex(columns, digest.hexdigest())

    def _row(
        self, shard: Path, key: str, entries: dict[str, tuple[int, int]]
    ) -> tuple[int, int, int]:
        """Offset and size of the image of a sample, and its label."""
        try:
            image = image_entry(entries, self._image)
            label = label_of_entries(
                entries, self._label, lambda name: bytes_at(shard, *entries[name])
            )
        except ValueError as error:
            name = key.removeprefix("/")
            raise FileError(f"{shard}: sample {name} must have {error}") from error
        return (*entries[image], _NO_LABEL if label is None else label)
