"""Image files as a data set: decoding on demand, checks of all files, and their hashes."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from ant_lightning.data.batch import Batch
from ant_lightning.data.dataset import ImageDataset
from ant_lightning.data.image_faults import image_faults
from ant_lightning.randomness import keyed_seed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class FolderImages(ImageDataset):
    """Image files, decoded each time they are loaded.

    Args:
        root: The folder.
        paths: The files, below `root`.
        labels: Class of each file, `[n]`.
        read: `read_picture` with all settings but the path.
        flip_seed: Seed that decides which images are mirrored; `None` mirrors none.
    """

    root: Path
    paths: list[Path]
    labels: Tensor
    _: KW_ONLY
    read: partial[np.ndarray]
    flip_seed: int | None

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, indices: list[int], *, epoch: int | None) -> Batch:
        """Load the images at `indices`, mirrored where `is_flipped` is true."""
        pictures = [self.read(self.paths[index]) for index in indices]
        for row, index in enumerate(indices):
            if is_flipped(self.flip_seed, epoch, index):
                pictures[row] = pictures[row][:, ::-1]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        rows = torch.tensor(indices)
        return Batch(pixels.float() / 127.5 - 1, self.labels[rows], rows)

    def fingerprint(self) -> str:
        """A hash of the files' names, sizes and times, and of the settings that read them.

        The pixels are not hashed, because a large folder would have to be decoded for it.
        """
        return hashlib.sha256(f"{self.read.keywords};".encode() + self.file_facts()).hexdigest()

    def file_facts(self) -> bytes:
        """Name, size and times of every file.

        The inode change time is among them: unlike the modification time, programs that copy or
        unpack files cannot set it back.
        """
        facts = []
        for path in self.paths:
            found = path.stat()
            name = os.fsencode(path.relative_to(self.root))  # a name need not be UTF-8
            times = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
            facts.append(name + f"\0{times};".encode())
        return b"".join(facts)

    def file_digests(self) -> bytes:
        """Digests of the names and bytes of all files."""
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # hashing releases the GIL
            return b"".join(pool.map(self._file_digest, self.paths))

    def _file_digest(self, path: Path) -> bytes:
        name = os.fsencode(path.relative_to(self.root))
        with path.open("rb") as file:
            return name + b"\0" + hashlib.file_digest(file, "sha256").digest()


def is_flipped(seed: int | None, epoch: int | None, index: int) -> bool:
    """Whether the image at `index` is mirrored in `epoch`: a fair coin keyed by the arguments.

    `seed=None` or `epoch=None` mirrors nothing.
    """
    if seed is None or epoch is None:
        return False
    return bool(keyed_seed(seed, "flip", epoch, index) & 1)


def broken_images(paths: list[Path]) -> dict[Path, str]:
    """Decode every image; returns the error of each image that fails.

    With several ranks, each rank decodes its share, and all ranks return the errors of all shares.
    """
    # `setup` calls this on every rank, when the process group exists already.
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    mine = paths[dist.get_rank() :: ranks] if ranks > 1 else paths
    found = image_faults(mine)
    if ranks == 1:
        return found
    parts: list[dict[Path, str]] = [{}] * ranks  # filled by all_gather_object
    dist.all_gather_object(parts, found)
    return dict(sorted((k, v) for part in parts for k, v in part.items()))
