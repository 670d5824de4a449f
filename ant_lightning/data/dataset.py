"""Data sets that return a whole batch for a list of positions."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ant_lightning.data.batch import Batch, to_uint8
from ant_lightning.errors import ConfigError

CHUNK = 256  # images in memory at once while a whole data set is read


class ImageDataset(Dataset[Batch], ABC):
    """Base of the data sets: images that are loaded a batch at a time.

    A subclass implements `load` and `__len__`. An augmentation must be a function of (seed, epoch,
    position) alone, so that a resumed run sees the same images. With `epoch=None` nothing is
    augmented.

    Examples:
        >>> import torch
        >>> from ant_lightning import Batch, ImageDataset
        >>> class Gradients(ImageDataset):
        ...     def __len__(self):
        ...         return 10
        ...
        ...     def load(self, indices, *, epoch):
        ...         rows = torch.tensor(indices)
        ...         images = torch.linspace(-1, 1, 10)[rows].view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
        ...         return Batch(images, torch.zeros_like(rows), rows)
        >>> Gradients().load([0, 9], epoch=None).images[:, 0, 0, 0].tolist()
        [-1.0, 1.0]
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, indices: list[int], *, epoch: int | None) -> Batch:
        """Load the images at `indices`."""

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The conditions of the images at `indices` beside labels; by default none."""
        del indices
        return {}

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """The images at `indices` as uint8 `[b, c, h, w]`, without augmentation, for metrics."""
        return to_uint8(self.load(list(indices), epoch=None).images)

    def fingerprint(self) -> str:
        """A hash of all pixels, stored with what was computed from them."""
        digest = hashlib.sha256()
        for start in range(0, len(self), CHUNK):
            pixels = self.pixels(range(start, min(start + CHUNK, len(self))))
            digest.update(f"{tuple(pixels.shape[1:])};".encode())
            digest.update(pixels.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, key: tuple[int | None, list[int]]) -> Batch:
        # A key of our samplers is a whole batch, so that a batch is loaded in one call.
        epoch, indices = key
        return self.load(indices, epoch=epoch)


class EncodedImages(ImageDataset):
    """Latents, or their moments, of images that may be at hand too.

    Attributes:
        real: The images that were encoded; `None` if they were not given.
    """

    real: ImageDataset | None

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """The pixels of the real images.

        Raises:
            ConfigError: If they were not given.
        """
        return self._needed().pixels(indices)

    def fingerprint(self) -> str:
        """The fingerprint of the real images."""
        return self._needed().fingerprint()

    def _needed(self) -> ImageDataset:
        if self.real is None:
            raise ConfigError(
                "images: must be given for metrics, as latents are no images; or give "
                "GenerationMetrics a reference file and with_train: false; found None"
            )
        return self.real


class TensorImages(ImageDataset):
    """Images that are held in memory, without augmentation.

    Args:
        images: `[n, c, h, w]` in [-1, 1].
        labels: `[n]` int64.

    Examples:
        >>> import torch
        >>> from ant_lightning import TensorImages
        >>> data = TensorImages(torch.zeros(5, 1, 8, 8), torch.arange(5))
        >>> data.load([3, 1], epoch=None).labels.tolist()
        [3, 1]
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: list[int], *, epoch: int | None) -> Batch:
        """The images at `indices`."""
        rows = torch.tensor(indices)
        return Batch(self.images[rows], self.labels[rows], rows)
