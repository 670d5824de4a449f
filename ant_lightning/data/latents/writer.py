"""Encodes the images of a data module into a cache, shard by shard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch

from ant_lightning.data.latents.cache import (
    IDENTITY_NAME,
    CacheIndex,
    Split,
    check_index,
    read_identity,
    save_array,
    shard_array,
    shard_path,
    write_index,
)
from ant_lightning.errors import ConfigError
from ant_lightning.files.identity import check_identity, write_identity

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.data.latents.space import LatentSpace
    from ant_lightning.data.loader import ImageDataset
    from ant_lightning.data.module import ImageDataModule

__all__ = ["Encoder", "LatentWriter"]

_SPLITS: tuple[Split, Split] = ("train", "held_out")


class Encoder(Protocol):
    """What the writer asks of a first stage."""

    @property
    def space(self) -> LatentSpace:
        """What its moments mean."""

    def moments_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of the moments of an image."""

    def encode_moments(self, images: Tensor) -> Tensor:
        """Moments of images `[b, c, h, w]` in [-1, 1]."""


class LatentWriter:
    """Writes the moments of all images, plain and mirrored, so that training needs no encoder.

    Shards are dealt out to the ranks in turn and need no communication. A shard appears whole or
    not at all; those that are there already are kept, so an interrupted command goes on where it
    was. A folder with the cache of another first stage, of other images (their bytes are compared,
    as times change in a copy), of another split, crop or size is refused.

    Args:
        output: Folder of the cache.
        shard_size: Images of a file.
        batch_size: Images that are encoded at once.
        dtype: `float16` halves the files and rounds the moments to 11 bits.
        flip: Whether to write the mirrored images too.

    Raises:
        ConfigError: If a size is below 1.
    """

    def __init__(
        self,
        output: str,
        *,
        shard_size: int = 1024,
        batch_size: int = 32,
        dtype: Literal["float32", "float16"] = "float32",
        flip: bool = True,
    ) -> None:
        if shard_size < 1 or batch_size < 1:
            raise ConfigError(
                "encode: shard_size and batch_size must be at least 1, found "
                f"{shard_size} and {batch_size}"
            )
        self.output = Path(output)
        self.shard_size = shard_size
        self.batch_size = batch_size
        self.dtype: Literal["float32", "float16"] = dtype
        self.flip = flip

    def write(
        self,
        data: ImageDataModule,
        encoder: Encoder,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> int:
        """Write the missing shards of this rank; returns how many these were."""
        images = {"train": data.train_images, "held_out": data.held_out_images}
        index = CacheIndex(
            space=encoder.space,
            image_shape=data.image_shape,
            moments_shape=encoder.moments_shape(data.image_shape),
            dtype=self.dtype,
            views=2 if self.flip else 1,
            num_classes=data.num_classes,
            num_images={split: len(images[split]) for split in _SPLITS},
            shard_size=self.shard_size,
        )
        begun = check_index(self.output, index)
        known = read_identity(self.output)
        if begun and known is None:
            raise ConfigError(
                f"cache.output: {self.output} does not say which images it was made of (no "
                f"{IDENTITY_NAME}, as in 0.1), so it cannot be continued; use another folder"
            )
        identity = data.identity(known)
        path = self.output / IDENTITY_NAME
        if not check_identity(path, identity, setting="cache.output"):
            write_identity(path, identity)
        # The index last, so that every cache with an index has an identity.
        if not begun:
            write_index(self.output, index)
        every = [(split, i) for split in _SPLITS for i in range(len(index.shards(split)))]
        missing = [each for each in every[rank::world_size] if not self._is_done(index, *each)]
        for split, shard in missing:
            moments, labels = self._encode(
                images[split], encoder, index.shards(split)[shard], device
            )
            # The moments last: their presence says that the shard is whole.
            save_array(shard_path(self.output, split, shard, "labels"), labels)
            save_array(shard_path(self.output, split, shard, "moments"), moments)
        return len(missing)

    def _encode(
        self,
        dataset: ImageDataset,
        encoder: Encoder,
        interval: tuple[int, int],
        device: torch.device | str,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`moments [n, views, c, h, w]` and `labels [n]` of the images start .. stop - 1."""
        moments, labels = [], []
        start, stop = interval
        for first in range(start, stop, self.batch_size):
            rows = list(range(first, min(first + self.batch_size, stop)))
            batch = dataset.load(rows, epoch=None)
            pixels = batch.images.to(device)
            views = [pixels, pixels.flip(-1)] if self.flip else [pixels]
            parts = [encoder.encode_moments(view).float().cpu() for view in views]
            # Cast in torch: numpy would warn of an overflow, which is reported below.
            moments.append(torch.stack(parts, dim=1).to(getattr(torch, self.dtype)).numpy())
            labels.append(batch.labels.numpy())
        result = np.concatenate(moments)
        bad = ~np.isfinite(result).reshape(len(result), -1).all(1)
        if bad.any():
            raise ConfigError(
                f"cache.dtype: the moments must be finite in {self.dtype}, but image "
                f"{start + int(bad.argmax())} of this split has a NaN or an infinity"
            )
        return result, np.concatenate(labels)

    def _is_done(self, index: CacheIndex, split: Split, shard: int) -> bool:
        try:
            for what in ("labels", "moments"):
                shard_array(self.output, index, split, shard, what)
        except ConfigError:
            return False  # missing, or damaged: written again
        return True
