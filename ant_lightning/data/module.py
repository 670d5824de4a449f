"""The LightningDataModule that the data modules share: loaders, ranks, real images for metrics."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from ant_lightning.data.loader import ImageDataset, RankKeys, ShuffledLoader, evaluation_loader
from ant_lightning.errors import ConfigError
from ant_lightning.randomness import run_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

__all__ = ["ImageDataModule"]


class ImageDataModule(L.LightningDataModule):
    """Training images in a resumable random order, held-out images in order.

    A subclass sets `image_shape` and `num_classes` and says in `prepare` what the images are.

    Attributes:
        image_shape: `(c, h, w)` of what the network sees.
        num_classes: 0 for data without labels.

    Args:
        batch_size: Images of one optimizer step, over all ranks.
        num_workers: Loading processes of each rank.
        seed: Decides the order of the training images; by default the seed of the run.
    """

    image_shape: tuple[int, int, int]
    num_classes: int = 0

    def __init__(self, *, batch_size: int, num_workers: int, seed: int | None) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"data.batch_size: must be at least 1, found {batch_size}")
        if num_workers < 0:
            raise ConfigError(f"data.num_workers: must be 0 or more, found {num_workers}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = run_seed(seed)
        self.predict_indices: Callable[[], Sequence[list[int]]] | None = None
        self._datasets: tuple[ImageDataset, ImageDataset] | None = None

    @abstractmethod
    def prepare(self) -> tuple[ImageDataset, ImageDataset]:
        """Training and held-out images; called once in each process."""

    @property
    def train_images(self) -> ImageDataset:
        """What is trained on."""
        return self._prepared()[0]

    @property
    def held_out_images(self) -> ImageDataset:
        """What is never trained on."""
        return self._prepared()[1]

    def setup(self, stage: str) -> None:
        """Find the images before anything starts, so that a fault is reported at once."""
        self._prepared()

    def train_dataloader(self) -> ShuffledLoader:
        """Shuffled, endless, resumable."""
        rank, world_size = self._ranks()
        return ShuffledLoader(
            self.train_images,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out images."""
        rank, world_size = self._ranks()
        return evaluation_loader(
            self.held_out_images,
            batch_size=max(1, self.batch_size // world_size),
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
        )

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader[Any]:
        """Indices of the images that `predict` draws; `SampleWriter` says which are missing.

        Raises:
            ConfigError: If there is no `SampleWriter`.
        """
        if self.predict_indices is None:
            raise ConfigError(
                "predict: needs to know which images to draw, so give the trainer a SampleWriter, "
                "or batches of indices in place of the data: DataLoader(range(8), batch_size=4)"
            )
        batches = self.predict_indices()
        own = RankKeys(range(len(batches)))
        return DataLoader(batches, batch_size=None, sampler=own, collate_fn=list)  # type: ignore[arg-type]

    def pixels(
        self,
        dataset: ImageDataset,
        *,
        limit: int | None = None,
        first: int = 0,
        every: int = 1,
    ) -> Iterator[Tensor]:
        """Images of `dataset` as uint8 `[b, c, h, w]`, without augmentation, for metrics.

        Args:
            dataset: The training or the held-out images.
            limit: Only images below this index.
            first: The first image; rank r of N takes `first=r, every=N`.
            every: Distance to the next.
        """
        count = len(dataset) if limit is None else min(limit, len(dataset))
        mine = range(first, count, every)
        for start in range(0, len(mine), 256):
            indices = list(mine[start : start + 256])
            yield to_uint8(dataset.load(indices, epoch=None).images)

    def fingerprint(self, dataset: ImageDataset) -> str:
        """A hash of the pixels of `dataset`: what is computed of them may be kept under it."""
        digest = hashlib.sha256()
        for batch in self.pixels(dataset):
            digest.update(f"{tuple(batch.shape[1:])};".encode())
            digest.update(batch.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _prepared(self) -> tuple[ImageDataset, ImageDataset]:
        if self._datasets is None:
            self._datasets = self.prepare()
        return self._datasets

    def _ranks(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as 0 .. 255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
