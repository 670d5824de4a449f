"""Where the samples of an archive lie: an index that is made once and kept beside the archive."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ant_lightning.errors import FileError
from ant_lightning.files.safetensors_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_FORMAT = 1


class ArchiveIndex(NamedTuple):
    """What is known of the samples of one archive.

    Attributes:
        columns: Numbers of each sample by name, `[n]` int64: offset, size, label, ...
        digest: Identifies the content; a copy of the archive has the same.
    """

    columns: dict[str, Tensor]
    digest: str


def archive_index(
    archive: Path,
    build: Callable[[], ArchiveIndex],
    *,
    columns: Sequence[str],
    settings: dict[str, Any],
) -> ArchiveIndex:
    """Read the index of an archive, or make it if there is none that fits.

    An index lies beside its archive, or in the user's cache where that folder cannot be written.
    It fits if size and time of the archive, and `settings`, are those that it was made with.
    Columns are mapped into memory, so that all processes of a machine share them.

    Args:
        archive: The archive.
        build: Makes the index.
        columns: Names of the columns.
        settings: What else decides the content of the index.
    """
    found = archive.stat()
    facts = {"format": _FORMAT, "size": found.st_size, "time": found.st_mtime_ns, **settings}
    expected = dict.fromkeys(columns, (torch.int64, ("n",)))
    places = [archive.with_name(f".{archive.name}.index"), _in_users_cache(archive)]
    for place in places:
        if place.is_file():
            try:
                tensors, entries = read_tensors(place, expected, {**facts, "digest": str})
            except FileError:
                continue  # of an older archive, or damaged: made anew
            return ArchiveIndex(tensors, entries["digest"])
    made = build()
    for place in places:
        try:
            write_tensors(place, made.columns, {**facts, "digest": made.digest})
            break
        except OSError:
            continue  # a folder that cannot be written; without any, it is made in every run
    return made


def bytes_at(archive: Path, offset: int, size: int) -> bytes:
    """The bytes `[offset, offset + size)` of a file.

    It is opened for each call: thousands of shards would exceed the files that a process may have
    open, and forked processes would share one position.

    Raises:
        FileError: If the file is shorter.
    """
    with archive.open("rb", buffering=0) as file:
        content = os.pread(file.fileno(), size, offset)
    if len(content) != size:
        raise FileError(f"{archive}: must have {size} bytes from {offset} on, found {len(content)}")
    return content


def _in_users_cache(archive: Path) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ant_lightning"
    key = hashlib.sha256(os.fsencode(archive.resolve())).hexdigest()[:16]
    return folder / f"{key}.index"
