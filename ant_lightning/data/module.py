"""The base class of the data modules: loaders, ranks, real images for metrics."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from ant_lightning.data.batch import to_uint8
from ant_lightning.data.class_map import record_classes
from ant_lightning.data.dataset import CHUNK, ImageDataset
from ant_lightning.data.loader import RankKeys, ShuffledLoader, evaluation_loader
from ant_lightning.data.workers import available_cores
from ant_lightning.errors import ConfigError, check_at_least
from ant_lightning.files.identity import differences, tensors_digest
from ant_lightning.randomness import run_seed
from ant_lightning.runtime.run_record import run_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

IMAGES_DIGEST = "digest of the images"  # a name in `identity`, worded for messages


class ImageDataModule(L.LightningDataModule):
    """Base of the data modules: training images in a resumable random order, held-out images.

    A subclass sets `image_shape` and `num_classes`, and returns its images from `prepare`.

    Attributes:
        image_shape: `(c, h, w)` of the images in a batch.
        num_classes: Number of classes; 0 for data without labels.
        identity_settings: Names of the subclass' own settings that determine the images.
        settings_determine_images: Whether equal settings always mean equal images, which holds for
            images drawn by a program. If false, `identity` also has a digest of the images.

    Args:
        batch_size: Images of one optimizer step, over all ranks.
        num_workers: Loading processes of each rank; `None`: four, or the cores of this machine.
        seed: Decides the order of the training images; by default the seed of the run.

    Raises:
        ConfigError: If a number is out of its range.

    Examples:
        Grey noise, from tensors in memory:

        >>> import torch
        >>> from ant_lightning import ImageDataModule, TensorImages
        >>> class Noise(ImageDataModule):
        ...     image_shape = (1, 8, 8)
        ...
        ...     def prepare(self):
        ...         labels = torch.zeros(20).long()
        ...         parts = (torch.rand(20, 1, 8, 8) * 2 - 1).split(16)
        ...         return tuple(TensorImages(part, labels[: len(part)]) for part in parts)
        >>> data = Noise(batch_size=5, num_workers=0, seed=0)
        >>> len(data.train_dataloader()), next(iter(data.val_dataloader())).indices.tolist()
        (3, [0, 1, 2, 3])
    """

    image_shape: tuple[int, int, int]
    num_classes: int = 0
    class_names: Sequence[str] = ()
    identity_settings: ClassVar[tuple[str, ...]] = ()
    settings_determine_images: ClassVar[bool] = False

    def __init__(self, *, batch_size: int, num_workers: int | None, seed: int | None) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size)
        if num_workers is None:
            num_workers = min(4, available_cores())
        check_at_least(0, num_workers=num_workers)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = run_seed(seed)
        self.predict_indices: Callable[[], Sequence[list[int]]] | None = None

    @abstractmethod
    def prepare(self) -> tuple[ImageDataset, ImageDataset]:
        """Return the training and the held-out images; called once in each process."""

    def shape_and_classes(self) -> tuple[tuple[int, int, int], int]:
        """Shape `(c, h, w)` and number of classes that a network must fit; decodes no image."""
        return self.image_shape, self.num_classes

    @cached_property
    def _parts(self) -> tuple[ImageDataset, ImageDataset]:
        return self.prepare()

    @property
    def train_images(self) -> ImageDataset:
        """The images that are trained on."""
        return self._parts[0]

    @property
    def held_out_images(self) -> ImageDataset:
        """The images that are never trained on."""
        return self._parts[1]

    def prepare_data(self) -> None:
        """Of one process: find the images before a logger starts, which would leave a run.

        Of several, each checks its share in `setup`.
        """
        if self._ranks()[1] == 1:
            _ = self._parts

    def setup(self, stage: str) -> None:
        """Find the images before anything starts, so that a fault is reported at once.

        `fit` writes the names of the classes to `class_map.json` in the run's folder, unless a
        file is there.
        """
        _ = self._parts
        if stage == "fit" and self.class_names and self.trainer is not None:
            path = run_folder(self.trainer) / "class_map.json"
            if self.trainer.is_global_zero:
                record_classes(path, list(self.class_names))

    def train_dataloader(self) -> ShuffledLoader:
        """The training images in random order; see `ShuffledLoader`."""
        rank, world_size = self._ranks()
        return ShuffledLoader(
            self.train_images,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            overfit_batches=self._overfit_batches(),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out images, each once."""
        rank, world_size = self._ranks()
        return evaluation_loader(
            self.held_out_images,
            # A rank's share of a training batch is known to fit into memory.
            batch_size=max(1, self.batch_size // world_size),
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
        )

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of indices of the images that `predict` is to draw, chosen by `SampleWriter`.

        Raises:
            ConfigError: If there is no `SampleWriter`.
        """
        if self.predict_indices is None:
            raise ConfigError(
                "predict: needs to know which images to draw, so give the trainer a SampleWriter, "
                "or batches of indices in place of the data: DataLoader(range(8), batch_size=4)"
            )
        batches = self.predict_indices()
        own = RankKeys(range(len(batches)))  # `batches` are those of this rank already
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
            first: Index of the first image; rank r of N takes `first=r, every=N`.
            every: Distance from one index to the next.
        """
        count = len(dataset) if limit is None else min(limit, len(dataset))
        mine = range(first, count, every)
        for start in range(0, len(mine), CHUNK):
            yield dataset.pixels(mine[start : start + CHUNK])

    def fingerprint(self, dataset: ImageDataset) -> str:
        """A hash that changes with the images of `dataset`, stored with results made from them."""
        return dataset.fingerprint()

    def settings(self) -> dict[str, Any]:
        """The settings that determine the images, by name."""
        names = ("image_shape", "num_classes", *self.identity_settings)
        return {name: getattr(self, name) for name in names}

    def digests(self, known: Mapping[str, Any]) -> dict[str, str]:
        """Digests that tell images with equal settings apart; here of all pixels and labels.

        Args:
            known: An earlier `identity`. If it shows that nothing changed, a subclass need not read
                its files again.
        """
        del known
        return (
            {}
            if self.settings_determine_images
            else {IMAGES_DIGEST: tensors_digest(self._tensors())}
        )

    def identity(self, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What determines the images and their split; stored with results made from them."""
        _ = self._parts  # calls `prepare`: only then are the classes of a folder known
        return {"data": type(self).__name__, **self.settings(), **self.digests(known or {})}

    def state_dict(self) -> dict[str, Any]:
        """The settings that determine the images."""
        return {"settings": self.settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn if the settings differ from those in the checkpoint."""
        stored, current = state_dict.get("settings", {}), self.settings()
        # Names that an older version did not store are not compared.
        found = differences(stored, {name: current.get(name) for name in stored})
        if found:
            each = "; ".join(
                f"{name}: the checkpoint has {then}, this run {now}"
                for name, (then, now) in found.items()
            )
            rank_zero_warn(
                f"{each}: the training images may have changed, and held-out images may have been "
                "trained on"
            )

    def _tensors(self) -> Iterator[Tensor]:
        """Pixels and labels of both parts."""
        for part in self._parts:
            # The length marks where a part ends: moving an image between the parts is a change.
            yield torch.tensor(len(part))
            for start in range(0, len(part), CHUNK):
                # As uint8: floats may differ between machines in the last bit.
                batch = part.load(list(range(len(part))[start : start + CHUNK]), epoch=None)
                yield to_uint8(batch.images)
                yield batch.labels

    def _overfit_batches(self) -> int | None:
        """`trainer.overfit_batches` as a number of batches; `None` if it is not set."""
        wanted = 0 if self.trainer is None else self.trainer.overfit_batches  # type: ignore[attr-defined]
        batches = len(self.train_images) // self.batch_size
        if not wanted or not batches:  # without a whole batch, the loader raises
            return None
        # A float is a share of the epoch, as in Lightning.
        number = int(wanted * batches) if isinstance(wanted, float) else min(wanted, batches)
        if number < 1:
            raise ConfigError(
                f"trainer.overfit_batches: must be at least one of the {batches} batches of an "
                f"epoch, found {wanted}"
            )
        return number

    def _ranks(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def image_data(trainer: L.Trainer) -> ImageDataModule | None:
    """The trainer's data module, if it is an `ImageDataModule`."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, ImageDataModule) else None


def needed_image_data(trainer: L.Trainer, who: str) -> ImageDataModule:
    """The trainer's `ImageDataModule`; a message names the callback `who`, which needs it.

    Raises:
        ConfigError: If the trainer has only loaders, or another data module.
    """
    data = image_data(trainer)
    if data is None:
        found = getattr(trainer, "datamodule", None)
        raise ConfigError(
            f"{who}: asks the data module for images, so the trainer needs an "
            "ant_lightning.ImageDataModule, found "
            + ("loaders alone" if found is None else type(found).__name__)
        )
    return data
