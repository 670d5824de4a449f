"""Generated images that were stored, in a folder or in an npz file of the ADM evaluator."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ant_lightning.data.image_search import find_images
from ant_lightning.data.pictures import is_grey, open_picture
from ant_lightning.errors import ConfigError, FileError, found_at
from ant_lightning.files.npz import ArrayHeader, open_npz

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

_MAX_SIDE = 2**14


class StoredImages:
    """A folder of images, or an npz file with `arr_0 [n, h, w, c]` uint8 as ADM writes it.

    The images of a folder are read in the order of their paths. All must have the same size. They
    are read as grey if every file is grey, else as RGB.

    Args:
        path: The folder or the file.

    Raises:
        ConfigError: If there are no images, or the npz file holds something else.

    Examples:
        >>> import numpy as np
        >>> from tempfile import NamedTemporaryFile
        >>> from ant_lightning import StoredImages
        >>> with NamedTemporaryFile(suffix=".npz") as file:
        ...     np.savez(file, np.zeros((3, 8, 8, 1), np.uint8))
        ...     file.flush()
        ...     [list(batch.shape) for batch in StoredImages(file.name).batches(batch_size=2)]
        [[2, 1, 8, 8], [1, 1, 8, 8]]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: Sequence[Path] = ()
        if self.path.is_dir():
            self._files = find_images(self.path, labels="none", setting="images")[0]
            self.num_images = len(self._files)
        elif self.path.exists():
            with open_npz(self.path) as file:
                self._shape = _checked_shape(self.path, file.headers.get("arr_0"))
            self.num_images = self._shape[0]
        else:
            raise ConfigError(f"images: must be a folder or an npz file, {found_at(self.path)}")
        if not self.num_images:
            raise ConfigError(f"images: must hold at least one image, found {self.path}")

    def batches(
        self, *, batch_size: int = 250, limit: int | None = None, first: int = 0, every: int = 1
    ) -> Iterator[Tensor]:
        """Read the images `first, first + every, ...` in batches, uint8 `[b, c, h, w]`.

        Args:
            batch_size: Images in a batch.
            limit: Only images below this index; `None` for all.
            first: Index of the first image; rank r of N takes `first=r, every=N`.
            every: Distance from one index to the next.

        Raises:
            ConfigError: If an image is damaged or has another size; names the file.
        """
        mine = range(first, self.num_images if limit is None else limit, every)
        if self._files:
            for start in range(0, len(mine), batch_size):
                yield self._read(mine[start : start + batch_size])
            return
        # An archive cannot be entered in the middle: every batch is read, and the wanted rows kept.
        start = 0
        for batch in self._npz_batches(batch_size):
            wanted = [i - start for i in range(start, start + len(batch)) if i in mine]
            start += len(batch)
            if wanted:
                yield batch[wanted]

    def _npz_batches(self, batch_size: int) -> Iterator[Tensor]:
        """Batches of all images, read one at a time: 50,000 images of 256 x 256 are 10 GB."""
        count, *sides = self._shape
        with open_npz(self.path) as file, file.stream("arr_0") as stream:
            for start in range(0, count, batch_size):
                shape = (min(batch_size, count - start), *sides)
                # A bytearray, because torch warns about memory that it may not write to.
                data = bytearray(stream.read(math.prod(shape)))
                pixels = torch.frombuffer(data, dtype=torch.uint8)
                yield pixels.view(shape).permute(0, 3, 1, 2)

    def _read(self, indices: range) -> Tensor:
        channels, (width, height) = self._channels_and_size
        pictures = []
        for path in (self._files[index] for index in indices):
            picture = open_picture(path, channels=channels)
            if picture.size != (width, height):
                raise ConfigError(
                    f"images: must all be {width} x {height} as {self._files[0].name}, found "
                    f"{picture.width} x {picture.height} in {path}"
                )
            pictures.append(np.asarray(picture).reshape(height, width, channels))
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape `(c, h, w)` of the first image."""
        if not self._files:
            _, height, width, channels = self._shape
            return channels, height, width
        channels, (width, height) = self._channels_and_size
        return channels, height, width

    @cached_property
    def _channels_and_size(self) -> tuple[int, tuple[int, int]]:
        """Channels (1 if all headers say grey, else 3), and width and height of the first image."""
        channels = 1 if all(is_grey(path) for path in self._files) else 3
        return channels, open_picture(self._files[0], channels=channels).size


def _checked_shape(path: Path, header: ArrayHeader | None) -> tuple[int, ...]:
    """Check the header of `arr_0`; returns `(n, h, w, c)`, with c = 1 for a file of `[n, h, w]`."""
    shape = header.shape if header else ()
    if (
        header is None
        or header.dtype != np.uint8
        or header.fortran_order
        or len(shape) not in {3, 4}
        or shape[3:] not in {(), (1,), (3,)}
        or not all(1 <= side <= _MAX_SIDE for side in shape[1:3])
    ):
        found = "nothing" if header is None else f"{header.dtype} of shape {list(shape)}"
        raise FileError(
            f"{path}: arr_0 must be uint8 images [n, h, w] or [n, h, w, c] with 1 or 3 channels, "
            f"in C order, with sides of at most {_MAX_SIDE}, found {found}"
        )
    return (*shape, 1)[:4]
