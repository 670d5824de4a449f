"""The base of the data modules for latents that other programs encoded."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ant_lightning.data.batch import Batch
from ant_lightning.data.dataset import EncodedImages, ImageDataset
from ant_lightning.data.folder_images import is_flipped
from ant_lightning.data.map_style import MapStyleData
from ant_lightning.data.module import IMAGES_DIGEST, ImageDataModule
from ant_lightning.data.split import split_positions
from ant_lightning.errors import ConfigError, check_at_least

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.utils.data import Dataset

    from ant_lightning.data.latents.space import LatentSpace


class OthersLatents(ImageDataModule):
    """Base of the data modules for latents of other programs.

    A subclass opens the files and reads moments. Which first
    stage encoded them is not known, so `model.first_stage` is not compared with it; it decodes with
    the scale and shift of these latents.

    Args:
        path: File or folder of the latents.
        batch_size: Images of one optimizer step, over all ranks.
        num_held_out: Images that are never trained on; by default a tenth, at most 1,000.
        num_classes: Number of classes; by default the largest label plus one. 0 ignores labels.
        images: The images that were encoded, in the same order, for metrics: a map-style data set.
        split_seed: Seed of the split.
        num_workers: Loading processes of each rank; by default four, or the cores of this machine.
        seed: Order of the images, and flips; by default the seed of the run.
    """

    identity_settings: ClassVar[tuple[str, ...]] = ("num_held_out", "split_seed")
    moments_shape: tuple[int, int, int]
    latent_space: LatentSpace
    labels: Tensor | None
    count: int
    has_mirrored = False

    def __init__(
        self,
        path: str,
        *,
        batch_size: int,
        num_held_out: int | None,
        num_classes: int | None,
        images: Dataset | None,
        split_seed: int,
        num_workers: int | None,
        seed: int | None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_at_least(0, num_classes=num_classes)
        self.cache = Path(path)
        self.num_held_out = num_held_out  # type: ignore[assignment]
        self.split_seed = split_seed
        self._open()
        most = 0 if self.labels is None else int(self.labels.max()) + 1
        if num_classes and num_classes < most:
            raise ConfigError(f"num_classes: must be at least {most}, found {num_classes}")
        self.num_classes = most if num_classes is None else num_classes
        self.image_shape = self.latent_space.latent_shape(self.moments_shape)
        self.images: MapStyleData | None = None
        if images is not None:
            count = len(images)  # type: ignore[arg-type]
            if count != self.count:
                raise ConfigError(f"images: must be the {self.count} of the latents, found {count}")
            self.images = MapStyleData(
                images,
                batch_size=batch_size,
                num_held_out=num_held_out,
                num_classes=0,
                split_seed=split_seed,
                flip=False,
                num_workers=num_workers,
                seed=seed,
            )
            self.image_shape = self.images.image_shape

    @abstractmethod
    def _open(self) -> None:
        """Set `moments_shape`, `latent_space`, `labels` and `count`."""

    @abstractmethod
    def moments(self, index: int, *, mirrored: bool) -> Tensor:
        """The moments of a sample, `[c, h, w]` float32."""

    @abstractmethod
    def content_digest(self) -> str:
        """Identifies the content of the files."""

    def shape_and_classes(self) -> tuple[tuple[int, int, int], int]:
        """Shape of the latents and number of classes."""
        return self.latent_space.latent_shape(self.moments_shape), self.num_classes

    def prepare(self) -> tuple[ImageDataset, ImageDataset]:
        """Split the latents, and with them the images."""
        train, held_out = split_positions(self.count, self.num_held_out, seed=self.split_seed)
        self.num_held_out = len(held_out)
        real = (None, None) if self.images is None else self.images._parts
        seed = self.seed if self.has_mirrored else None
        return (
            _Moments(self, train, real[0], flip_seed=seed),
            _Moments(self, held_out, real[1], flip_seed=None),
        )

    def settings(self) -> dict[str, Any]:
        """What determines the latents."""
        space = self.latent_space
        return {**super().settings(), "scale": space.scale, "shift": space.shift}

    def digests(self, known: Mapping[str, Any]) -> dict[str, str]:
        """A digest of names and sizes or checksums; the content is not read for it."""
        del known
        return {IMAGES_DIGEST: self.content_digest()[:16]}


@dataclass(eq=False)
class _Moments(EncodedImages):
    """Moments at the given positions, with the real images for metrics."""

    data: OthersLatents
    positions: Tensor
    real: ImageDataset | None
    _: KW_ONLY
    flip_seed: int | None

    def __len__(self) -> int:
        return len(self.positions)

    def load(self, indices: list[int], *, epoch: int | None) -> Batch:
        """Load the moments; those of the mirrored image where `is_flipped` is true."""
        rows = torch.tensor(indices)
        places = self.positions[rows]
        moments = [
            self.data.moments(place, mirrored=is_flipped(self.flip_seed, epoch, index))
            for index, place in zip(indices, places.tolist(), strict=True)
        ]
        with_labels = self.data.num_classes and self.data.labels is not None
        labels = self.data.labels[places] if with_labels else torch.zeros_like(rows)  # type: ignore[index]
        return Batch(torch.stack(moments), labels, rows)
