"""The data module for training on cached latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.data.batch import Batch
from ant_lightning.data.dataset import EncodedImages, ImageDataset
from ant_lightning.data.folder_images import is_flipped
from ant_lightning.data.latents.cache import read_index
from ant_lightning.data.module import ImageDataModule
from ant_lightning.errors import ConfigError
from ant_lightning.files.identity import differences, shortened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class LatentsData(ImageDataModule):
    """Moments of a first stage from a cache that `ant-lightning encode` wrote.

    The `images` of a batch are moments. From them, the LightningModule draws a new latent in every
    step. If the LightningModule has a first stage, it must be the one that encoded the cache.

    Args:
        cache: Folder of the cache.
        batch_size: Images of one optimizer step, over all ranks.
        flip: Whether mirrored images are used too, if the cache has them.
        images: Data module of the encoded images, for metrics and grids with real images.
        num_workers: Loading processes of each rank.
        seed: Order of the images, and flips; by default the seed of the run.

    Attributes:
        latent_space: How latents are drawn from the moments.
        moments_shape: `(c, h, w)` of the moments.

    Raises:
        ConfigError: If the cache is incomplete or damaged, or was not encoded from `images`.

    Examples:
        >>> import tempfile
        >>> from ant_lightning import LatentsData, LatentSpace, LatentWriter, ShapesData
        >>> class Subsampling:  # stands for a `FirstStage`
        ...     space = LatentSpace(kind="vq", scale=1.0, shift=0.0, fingerprint="", source="")
        ...     moments_shape = staticmethod(lambda shape: (shape[0], shape[1] // 4, shape[2] // 4))
        ...     encode_moments = staticmethod(lambda images: images[:, :, ::4, ::4])
        >>> images = ShapesData(image_size=16, num_images=6, num_held_out=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = LatentWriter(folder).write(images, Subsampling())
        ...     data = LatentsData(folder, batch_size=3, images=images)
        ...     batches = [batch.images.shape for batch in data.train_dataloader()]
        >>> data.moments_shape, batches
        ((3, 4, 4), [torch.Size([3, 3, 4, 4]), torch.Size([3, 3, 4, 4])])
    """

    settings_determine_images = True

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

    @property
    def null_condition(self) -> dict[str, Tensor]:
        """Null values of conditions: those of `images`."""
        return getattr(self.images, "null_condition", {})

    def shape_and_classes(self) -> tuple[tuple[int, int, int], int]:
        """Shape of the latents and number of classes."""
        return self.latent_space.latent_shape(self.moments_shape), self.num_classes

    def prepare(self) -> tuple[ImageDataset, ImageDataset]:
        """Map the shards of both splits, and compare the cache with `images`."""
        if self.images is not None:
            self._check_images(self.images)
        # A cache without mirrored moments has nothing to flip to.
        seed = self.seed if self.flip and self.index.views == 2 else None
        real = None if self.images is None else self.images.train_images
        held_out = None if self.images is None else self.images.held_out_images
        return (
            _CachedMoments(self, "train", real, flip_seed=seed),
            _CachedMoments(self, "held_out", held_out, flip_seed=None),
        )

    def settings(self) -> dict[str, Any]:
        """The first stage, and the identity of the images that the cache was encoded from."""
        images = {f"images.{name}": value for name, value in self.index.identity.items()}
        images.pop("images.times", None)  # a copy of the same files has other times
        return {**super().settings(), "first_stage": self.latent_space.fingerprint, **images}

    def _check_images(self, images: ImageDataModule) -> None:
        """Refuse images other than those that were encoded, or another split of them.

        With another split, some held-out images would have been trained on.
        """
        stored = self.index.identity
        for name, (then, now) in differences(stored, images.identity(stored)).items():
            raise ConfigError(
                f"images: must be those of the cache {self.cache}, which was made with {name} "
                f"{shortened(then)}, found {shortened(now)}"
            )


class _CachedMoments(EncodedImages):
    """Moments of one split, read from the mapped shards, with the real images for metrics."""

    def __init__(
        self, data: LatentsData, split: str, real: ImageDataset | None, *, flip_seed: int | None
    ) -> None:
        # All shards are mapped here, which checks headers and lengths: faults show before training.
        shards = [shard.read(data.cache) for shard in data.index.shards(split)]
        self._moments = [moments for moments, _ in shards]
        self.labels = torch.cat([labels for _, labels in shards])
        self.real = real
        self._flip_seed = flip_seed
        self._shard_size = data.index.shard_size

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, indices: list[int], *, epoch: int | None) -> Batch:
        """Load moments at `indices`; those of the mirrored image where `is_flipped` is true."""
        moments = []
        for index in indices:
            shard, position = divmod(index, self._shard_size)
            view = int(is_flipped(self._flip_seed, epoch, index))
            moments.append(self._moments[shard][position, view])
        rows = torch.tensor(indices)
        # Stacking is what reads the values from the mapped files.
        told = self.conditions(indices)
        return Batch(torch.stack(moments).float(), self.labels[rows], rows, told)

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Those of the real images, where `LatentsData` was given them."""
        return {} if self.real is None else self.real.conditions(indices)
