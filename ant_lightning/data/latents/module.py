"""Training on latents that were encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from ant_lightning.data.batch import Batch
from ant_lightning.data.dataset import ImageDataset
from ant_lightning.data.image_folder import is_flipped
from ant_lightning.data.latents.cache import CacheIndex, Split, read_index, read_shard
from ant_lightning.data.module import ImageDataModule
from ant_lightning.errors import ConfigError
from ant_lightning.files.identity import differences, shortened

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["LatentsData"]


class _CachedMoments(ImageDataset):
    """Moments of one split, read from the mapped shards."""

    def __init__(
        self, folder: Path, index: CacheIndex, split: Split, *, flip_seed: int | None
    ) -> None:
        # Opening every shard checks its header and length, so that a fault shows at once.
        shards = [read_shard(folder, index, split, i) for i in range(len(index.shards(split)))]
        self._moments = [moments for moments, _ in shards]
        self.labels = torch.cat([labels for _, labels in shards])
        self._index = index
        self._flip_seed = flip_seed

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, indices: list[int], *, epoch: int | None) -> Batch:
        """Moments at `indices`, of the mirrored image by the coin of (seed, epoch, index)."""
        moments = torch.empty(len(indices), *self._index.moments_shape)
        for row, index in enumerate(indices):
            shard, position = divmod(index, self._index.shard_size)
            view = int(is_flipped(self._flip_seed, epoch, index))
            moments[row] = self._moments[shard][position, view]
        rows = torch.tensor(indices)
        return Batch(moments, self.labels[rows], rows)


class LatentsData(ImageDataModule):
    """Moments of a first stage from a cache that `ant-lightning encode` wrote.

    The batches' images are moments, from which the module draws a latent in every step; its first
    stage, if it has one, must be the one of the cache. `LatentWriter` has an example.

    Args:
        cache: Folder of the cache.
        batch_size: Images of one optimizer step, over all ranks.
        flip: Whether mirrored images are used too, if the cache has them.
        images: The images that were encoded, for metrics and grids with real images.
        num_workers: Loading processes of each rank.
        seed: Order of the images, and flips; by default the seed of the run.

    Attributes:
        latent_space: What the moments mean.
        moments_shape: `(c, h, w)` of the moments.

    Raises:
        ConfigError: If the cache is incomplete or damaged, or of other images than `images`.
    """

    settings_suffice = True

    def __init__(
        self,
        cache: str,
        *,
        batch_size: int,
        flip: bool = True,
        images: ImageDataModule | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.cache = Path(cache)
        self.index = read_index(self.cache)
        self.image_shape = self.index.image_shape
        self.num_classes = self.index.num_classes
        self.moments_shape = self.index.moments_shape
        self.latent_space = self.index.space
        self.flip = flip
        self.images = images

    def prepare(self) -> tuple[ImageDataset, ImageDataset]:
        """Map the shards of both splits, and compare the cache with `images`."""
        seed = self.seed if self.flip and self.index.views == 2 else None
        train = _CachedMoments(self.cache, self.index, "train", flip_seed=seed)
        held_out = _CachedMoments(self.cache, self.index, "held_out", flip_seed=None)
        if self.index.identity is None:
            rank_zero_warn(
                f"cache: {self.cache} does not say which images it was made of, as caches of "
                "version 0.1, so they cannot be compared; encode again into another folder"
            )
        if self.images is not None:
            self._check_images(self.images)
        return train, held_out

    def pixels(
        self,
        dataset: ImageDataset,
        *,
        limit: int | None = None,
        first: int = 0,
        every: int = 1,
    ) -> Iterator[Tensor]:
        """Real images of a split of the cache, from `images`."""
        images, real = self._real(dataset)
        return images.pixels(real, limit=limit, first=first, every=every)

    def fingerprint(self, dataset: ImageDataset) -> str:
        """That of the real images of a split."""
        images, real = self._real(dataset)
        return images.fingerprint(real)

    def settings(self) -> dict[str, Any]:
        """The first stage and the images that the cache was made of."""
        images = {f"images.{name}": value for name, value in (self.index.identity or {}).items()}
        images.pop("images.times", None)  # times differ between copies
        return {**super().settings(), "first_stage": self.latent_space.fingerprint, **images}

    def _check_images(self, images: ImageDataModule) -> None:
        """Refuse images that the cache was not made of, or another split of them.

        With another split, training images would be among the held-out ones.
        """
        current: dict[str, Any] = {
            "num_images": {
                "train": len(images.train_images),
                "held_out": len(images.held_out_images),
            }
        }
        stored: dict[str, Any] = {"num_images": self.index.num_images}
        if self.index.identity is not None:
            stored |= self.index.identity
            current |= images.identity(self.index.identity)
        for name, (then, now) in differences(stored, current).items():
            raise ConfigError(
                f"images: must be those of the cache {self.cache}, which was made with {name} "
                f"{shortened(then)}, found {shortened(now)}"
            )

    def _real(self, dataset: ImageDataset) -> tuple[ImageDataModule, ImageDataset]:
        """The data module that has the pixels, and its counterpart of a split of the cache."""
        if self.images is None:
            raise ConfigError(
                "images: real images are needed for metrics, as the latent cache "
                f"{self.cache} has none; or give GenerationMetrics a reference file and "
                "with_train: false; found None"
            )
        of_train = dataset is self.train_images
        real = self.images.train_images if of_train else self.images.held_out_images
        return self.images, real
