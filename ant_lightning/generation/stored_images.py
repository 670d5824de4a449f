"""Images that were drawn before, in the place of a model, so that `test` can score them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import numpy as np
import torch

from ant_lightning.data.image_files import find_images
from ant_lightning.data.pictures import is_grey, open_picture
from ant_lightning.errors import ConfigError
from ant_lightning.generation.image_files import image_batches, num_images

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["StoredImages"]

_GREY = frozenset({"1", "L", "LA", "I", "I;16", "I;16B"})


class StoredImages(L.LightningModule):
    """A folder of images, or an npz file in ADM's format, to be measured by `GenerationMetrics`.

        Trainer(callbacks=[GenerationMetrics(extractor)]).test(StoredImages("samples"), data)

    The images of a folder are taken in the order of their paths and must be of one size; they are
    grey only if all are.

    Args:
        path: The folder, or a file with `arr_0 [n, h, w, c]` uint8.

    Raises:
        ConfigError: If there are no images there.
    """

    num_classes = 0  # nobody knows which class was asked for
    seed = 0
    trained_steps = 0

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        if not self.path.exists():
            raise ConfigError(f"images: must be a folder or an npz file, found {self.path}")
        self._files: list[Path] = []
        if self.path.is_dir():
            self._files = find_images(self.path, labels="none", setting="images")[0]
            self.num_images = len(self._files)
        else:
            self.num_images = num_images(self.path)
        if not self.num_images:
            raise ConfigError(f"images: must hold at least one image (arr_0), found {self.path}")

    def batches(
        self, num_images: int, *, first: int, every: int, batch_size: int
    ) -> Iterator[Tensor]:
        """uint8 `[b, c, h, w]` of the images `first, first + every, ...` below `num_images`.

        Raises:
            ConfigError: Naming the file, if an image is broken or of another size.
        """
        if self._files:
            indices = range(first, num_images, every)
            for start in range(0, len(indices), batch_size):
                yield self._read(indices[start : start + batch_size])
            return
        position = 0
        for batch in image_batches(self.path, batch_size=batch_size):
            numbers = torch.arange(position, min(position + len(batch), num_images))
            position += len(batch)
            mine = (numbers % every == first).nonzero().flatten()
            if len(mine):
                yield batch[mine]

    def test_step(self, batch: object, batch_idx: int) -> None:
        """There is no loss."""

    def _read(self, indices: range) -> Tensor:
        channels, size = self._channels_and_size
        pictures = []
        for index in indices:
            picture = open_picture(self._files[index], channels=channels)
            if picture.size != size:
                raise ConfigError(
                    f"images: {self._files[index]} must be {size[0]} x {size[1]} as "
                    f"{self._files[0].name}, found {picture.size[0]} x {picture.size[1]}"
                )
            pictures.append(np.asarray(picture).reshape(size[1], size[0], -1).transpose(2, 0, 1))
        return torch.from_numpy(np.stack(pictures))

    @cached_property
    def _channels_and_size(self) -> tuple[int, tuple[int, int]]:
        """1 if every file is grey, as the headers say, else 3; width and height of the first."""
        channels = 1 if all(is_grey(path) for path in self._files) else 3
        return channels, open_picture(self._files[0], channels=channels).size
