"""Encodes the images of a data module into a cache, shard by shard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from ant_lightning.data.latents.cache import (
    INDEX_NAME,
    CacheIndex,
    Shard,
    check_first_stage,
    read_index,
)
from ant_lightning.data.module import ImageDataModule
from ant_lightning.errors import ConfigError, FileError, check_at_least
from ant_lightning.files.identity import check_identity
from ant_lightning.files.json_file import write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ant_lightning.data.dataset import ImageDataset
    from ant_lightning.data.latents.space import LatentSpace


class Encoder(Protocol):
    """The part of a first stage that `LatentWriter` uses."""

    @property
    def space(self) -> LatentSpace:
        """The latent space."""

    def moments_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape `(c, h, w)` of the moments of an image."""

    def encode_moments(self, images: Tensor) -> Tensor:
        """Moments of images `[b, c, h, w]` in [-1, 1]."""


class LatentWriter:
    """Writes the moments of all images, plain and mirrored, so that training needs no encoder.

    Rank r of N writes the shards r, r + N, ..., without communication, and holds one shard in
    memory. It may be interrupted at any time: shards are written atomically, and the next call
    writes the missing ones. A folder that holds another cache is refused: one of another first
    stage, of other images, or of another split, crop or size. Images are compared by their bytes,
    because a copy changes the times.

    Args:
        output: Folder of the cache.
        shard_size: Number of images in a shard, which is one file.
        batch_size: Number of images encoded at once.
        dtype: `float16` halves the size of the files, and rounds the moments to 11 bits.
        flip: Whether to write the mirrored images too.

    Raises:
        ConfigError: If a size is below 1.

    Examples:
        >>> import tempfile, torch
        >>> from ant_lightning import LatentsData, LatentSpace, LatentWriter, ShapesData
        >>> class Halving:  # stands for a `FirstStage`
        ...     space = LatentSpace(kind="vq", scale=1.0, shift=0.0, fingerprint="", source="")
        ...     moments_shape = staticmethod(lambda shape: (shape[0], shape[1] // 2, shape[2] // 2))
        ...     encode_moments = staticmethod(lambda images: images[:, :, ::2, ::2])
        >>> images = ShapesData(image_size=8, num_images=5, num_held_out=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shards = LatentWriter(folder, shard_size=4).write(images, Halving())
        ...     data = LatentsData(folder, batch_size=5)
        ...     (batch,) = data.train_dataloader()
        >>> shards, batch.images.shape
        (3, torch.Size([5, 3, 4, 4]))
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
        check_at_least(1, shard_size=shard_size, batch_size=batch_size)
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
        on_progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Write the missing shards of this rank; returns how many were missing.

        `on_progress` is called with the number of shards written, and of those to write.

        Raises:
            ConfigError: If the folder holds another cache, or moments are not finite.
        """
        found = read_index(self.output) if (self.output / INDEX_NAME).exists() else None
        images = {"train": data.train_images, "held_out": data.held_out_images}
        index = CacheIndex(
            space=encoder.space,
            image_shape=data.image_shape,
            moments_shape=encoder.moments_shape(data.image_shape),
            dtype=self.dtype,
            views=2 if self.flip else 1,
            num_classes=data.num_classes,
            num_images={split: len(dataset) for split, dataset in images.items()},
            shard_size=self.shard_size,
            identity=data.identity(found.identity if found else None),
        )
        shards = [*index.shards("train"), *index.shards("held_out")][rank::world_size]
        if found is not None:
            check_first_stage(found.space, index.space, self.output)
            # The fingerprints are equal, so the weights are. Keep the stored `source`: the path of
            # the weights may have changed, which must not count as a difference below.
            index = replace(index, space=found.space)
        path = self.output / INDEX_NAME
        # Only an index tells which images the shards were encoded from. Without one, shards in the
        # folder are written again.
        if check_identity(path, index.as_json(), setting="output"):
            shards = [shard for shard in shards if not self._is_whole(shard)]
        else:
            write_json(path, index.as_json())
        for count, shard in enumerate(shards):
            if on_progress is not None:
                on_progress(count, len(shards))
            moments, labels = self._encode(images[shard.split], encoder, shard, device)
            shard.write(self.output, moments=moments, labels=labels)
        return len(shards)

    def _encode(
        self,
        dataset: ImageDataset,
        encoder: Encoder,
        shard: Shard,
        device: torch.device | str,
    ) -> tuple[Tensor, Tensor]:
        """Encode a shard; returns `moments [n, views, c, h, w]` and `labels [n]`."""
        moments, labels = [], []
        start = shard.number * self.shard_size
        rows = list(range(start, start + shard.num_images))
        for first in range(0, len(rows), self.batch_size):
            batch = dataset.load(rows[first : first + self.batch_size], epoch=None)
            pixels = batch.images.to(device)
            # The mirrored image is encoded: its moments are not the mirrored moments, because the
            # encoder is not symmetric.
            views = [pixels, pixels.flip(-1)] if self.flip else [pixels]
            parts = [encoder.encode_moments(view).float().cpu() for view in views]
            moments.append(torch.stack(parts, dim=1).to(getattr(torch, self.dtype)))
            labels.append(batch.labels)
        result = torch.cat(moments)
        bad = ~result.flatten(1).isfinite().all(1)
        if bool(bad.any()):
            raise ConfigError(
                f"dtype: the moments must be finite in {self.dtype}, found a NaN or an infinity in "
                f"image {start + int(bad.int().argmax())} of this split"
            )
        return result, torch.cat(labels)

    def _is_whole(self, shard: Shard) -> bool:
        try:
            shard.read(self.output)
        except FileError:
            return False  # missing, or damaged: written again
        return True
