"""The data module for any map-style data set: of torchvision, of Hugging Face, or one's own."""

from __future__ import annotations

import hashlib
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from ant_lightning.data.batch import Batch
from ant_lightning.data.dataset import ImageDataset
from ant_lightning.data.folder_images import is_flipped
from ant_lightning.data.module import IMAGES_DIGEST, ImageDataModule
from ant_lightning.data.pictures import Crop
from ant_lightning.data.samples import (
    Key,
    image_of,
    keyed_libraries,
    label_key,
    label_of,
    num_channels,
    training_image,
)
from ant_lightning.data.split import split_positions
from ant_lightning.errors import ConfigError
from ant_lightning.sizes import Size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class MapStyleData(ImageDataModule):
    """Images of any data set with `len(dataset)` and `dataset[i]`.

    A sample is a tuple `(image, label, ..)`, a mapping with an image and perhaps a label, or an
    image alone. An image is a PIL image, encoded bytes, or an array or tensor, `[h, w]`,
    `[h, w, c]` or `[c, h, w]`: the end with 1, 3 or 4 entries is that of the channels (if both
    have, the last one of an array, the first one of a tensor). Transparent pictures, and uint8
    images of 4 channels, are composited on white. Size, channels and classes are found from the
    data set; no more than its first sample is decoded before training.

    Order, flips and the split are those of our loaders: every image once an epoch whatever the
    number of ranks and loading processes, and a resumed run goes on bit for bit. That includes
    random transforms of the data set, if they draw from the global generators of Python, NumPy or
    PyTorch: these are seeded by (seed, epoch, position) around every sample. A transform with a
    generator of its own breaks the promise.

    Args:
        dataset: The training images; without `held_out`, those that are held out too.
        held_out: Images that are never trained on; by default a random part of `dataset`.
        batch_size: Images of one optimizer step, over all ranks.
        num_held_out: Size of that part; by default a tenth, at most 1,000.
        image_size: Height and width that images are cropped and resized to, one number for a
            square; by default those of the first image, which all must have then.
        num_classes: Number of classes; by default what `dataset.classes`, `dataset.num_classes` or
            its `features` say, as those of Hugging Face. 0 ignores labels.
        image: Name or place of the image in a sample; by default the entry called `image`, `img`,
            ..., or the first.
        label: Name or place of the label; by default the entry called `label`, ..., or the second.
        channels: 3 for colour, 1 for grey; by default those of the first image.
        crop: `center_adm` as ADM and DiT crop, or `resize`.
        value_range: What floating-point images run from and to; uint8 and PIL images do not use it.
        flip: Whether training images are mirrored in half of the epochs.
        split_seed: Seed of the split; part of the data set, so separate from the run's seed.
        num_workers: Loading processes of each rank; by default four, or the cores of this machine.
        seed: Order of the images, flips and transforms; by default the seed of the run.

    Raises:
        ConfigError: If the data set holds something else, or a setting does not fit it.

    Examples:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from ant_lightning import MapStyleData
        >>> dataset = TensorDataset(torch.zeros(20, 1, 8, 8), torch.arange(20) % 4)
        >>> data = MapStyleData(dataset, num_classes=4, batch_size=6, seed=0)
        >>> data.image_shape, len(data.train_images), len(data.held_out_images)
        ((1, 8, 8), 18, 2)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.images.shape, batch.images.unique().tolist()  # 0 .. 1 became -1 .. 1
        (torch.Size([6, 1, 8, 8]), [-1.0])
    """

    identity_settings = ("crop", "value_range", "split_seed", "num_held_out")

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        held_out: Dataset | None = None,
        num_held_out: int | None = None,
        image_size: Size | None = None,
        num_classes: int | None = None,
        image: Key = None,
        label: Key = None,
        channels: int | None = None,
        crop: Crop = "center_adm",
        value_range: tuple[float, float] = (0.0, 1.0),
        flip: bool = True,
        split_seed: int = 0,
        num_workers: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        for name, each in (("dataset", dataset), ("held_out", held_out)):
            if each is not None and not (hasattr(each, "__len__") and len(each)):
                raise ConfigError(
                    f"{name}: must be a data set with a length above 0 and samples by number, "
                    f"found a {type(each).__name__}"
                )
        if held_out is not None and num_held_out is not None:
            raise ConfigError(
                f"num_held_out: must be left out beside held_out, found {num_held_out}"
            )
        if not value_range[0] < value_range[1]:
            raise ConfigError(f"value_range: must increase, found {value_range}")
        self.dataset = dataset
        self.held_out = held_out
        self.num_held_out = len(held_out) if held_out is not None else num_held_out  # type: ignore[arg-type]
        self.crop = crop
        self.value_range = value_range
        self.flip = flip
        self.split_seed = split_seed
        self.image, self.label = image, label
        sample = self._sample(dataset, 0)
        found = image_of(sample, image)
        channels = num_channels(found) if channels is None else channels
        self.image_size = image_size
        first = self.converted(found, channels)
        self.image_shape = (channels, first.shape[1], first.shape[2])
        self.num_classes = self._classes(sample, num_classes)
        self.class_names = _names(self._declared(sample), self.num_classes)

    def prepare(self) -> tuple[ImageDataset, ImageDataset]:
        """Split the images, or take the two data sets as they are."""
        count = len(self.dataset)  # type: ignore[arg-type]
        seed = self.seed if self.flip else None
        everything = torch.arange(count)
        if self.held_out is not None:
            held_out = torch.arange(len(self.held_out))  # type: ignore[arg-type]
            return (
                _Samples(self, self.dataset, everything, flip_seed=seed),
                _Samples(self, self.held_out, held_out, flip_seed=None),
            )
        train, held_out = split_positions(count, self.num_held_out, seed=self.split_seed)
        self.num_held_out = len(held_out)
        return (
            _Samples(self, self.dataset, train, flip_seed=seed),
            _Samples(self, self.dataset, held_out, flip_seed=None),
        )

    def digests(self, known: Mapping[str, Any]) -> dict[str, str]:
        """What the data sets say identifies them, or else a digest of all pixels."""
        parts = (self.dataset,) if self.held_out is None else (self.dataset, self.held_out)
        found = [getattr(part, "fingerprint", None) for part in parts]
        if not all(isinstance(each, str) for each in found):
            return super().digests(known)
        return {IMAGES_DIGEST: hashlib.sha256(repr(found).encode()).hexdigest()[:16]}

    def converted(self, image: Any, channels: int) -> Tensor:  # noqa: ANN401
        """An image of a sample as `[c, h, w]` in [-1, 1]."""
        return training_image(
            image,
            channels=channels,
            image_size=self.image_size,
            crop=self.crop,
            value_range=self.value_range,
        )

    def loaded(self, dataset: Dataset, index: int, epoch: int | None) -> tuple[Tensor, int]:
        """Image and label of a sample.

        Raises:
            ConfigError: If the sample does not fit the first one; names its position.
        """
        try:
            with keyed_libraries(self.seed, "sample", -1 if epoch is None else epoch, index):
                sample = self._sample(dataset, index)
            image = self.converted(image_of(sample, self.image), self.image_shape[0])
            label = label_of(sample, self.label) if self.num_classes else 0
        except ConfigError as error:
            raise type(error)(f"dataset: sample {index}: {error}") from error
        if tuple(image.shape) != self.image_shape:
            raise ConfigError(
                f"image_size: must be given where images differ, found {list(image.shape)} in "
                f"sample {index} after {list(self.image_shape)}"
            )
        if label is None or not 0 <= label < max(1, self.num_classes):
            raise ConfigError(
                f"num_classes: labels must be from 0 to {self.num_classes - 1}, found {label} in "
                f"sample {index}"
            )
        return image, label

    @staticmethod
    def _sample(dataset: Dataset, index: int) -> Any:  # noqa: ANN401
        try:
            return dataset[index]
        except ConfigError:
            raise
        except Exception as error:  # whatever a data set or its transform raises
            raise ConfigError(
                f"dataset: {type(dataset).__name__} must give sample {index}, found "
                f"{type(error).__name__}: {error}"
            ) from error

    def _declared(self, sample: Any) -> Any:  # noqa: ANN401
        """The names of the classes that the data set declares: `classes`, or those of a feature."""
        names = getattr(self.dataset, "classes", None)
        if names is not None:
            return names
        features = getattr(self.dataset, "features", None)  # `datasets.Dataset`
        label = features.get(label_key(sample, self.label)) if isinstance(features, dict) else None
        return getattr(label, "names", None)

    def _classes(self, sample: Any, num_classes: int | None) -> int:  # noqa: ANN401
        """The number of classes: what is given, or what the data set declares."""
        if num_classes is not None:
            return num_classes
        label = label_of(sample, self.label)
        if label is None:
            return 0
        names = self._declared(sample)
        found = len(names) if names is not None else getattr(self.dataset, "num_classes", None)
        if not isinstance(found, int):
            raise ConfigError(
                f"num_classes: must be given, as samples have labels and "
                f"{type(self.dataset).__name__} does not say how many classes there are (0 ignores "
                "labels), found None"
            )
        return found


def _names(classes: object, num_classes: int) -> list[str]:
    """The names of the classes, if the data set has a list of so many, as torchvision's do.

    ImageNet has several names for each class.
    """
    if not isinstance(classes, list | tuple) or len(classes) != num_classes:
        return []
    names = [", ".join(map(str, each)) if isinstance(each, tuple) else each for each in classes]
    fine = all(isinstance(each, str) and each and "/" not in each for each in names)
    return names if fine and len(set(names)) == num_classes else []


@dataclass(eq=False)
class _Samples(ImageDataset):
    """The samples of a data set at the given positions."""

    data: MapStyleData
    dataset: Dataset
    positions: Tensor
    _: KW_ONLY
    flip_seed: int | None

    def __len__(self) -> int:
        return len(self.positions)

    def load(self, indices: list[int], *, epoch: int | None) -> Batch:
        """Load the samples at `indices`, mirrored where `is_flipped` is true."""
        rows = torch.tensor(indices)
        images, labels = [], []
        for index, position in zip(indices, self.positions[rows].tolist(), strict=True):
            image, label = self.data.loaded(self.dataset, position, epoch)
            images.append(image.flip(-1) if is_flipped(self.flip_seed, epoch, index) else image)
            labels.append(label)
        return Batch(torch.stack(images), torch.tensor(labels), rows)

    def fingerprint(self) -> str:
        """A hash of what the data set says identifies it, or else of all pixels."""
        known = getattr(self.dataset, "fingerprint", None)
        if not isinstance(known, str):
            return super().fingerprint()
        digest = hashlib.sha256(f"{known};{self.data.settings()};".encode())
        digest.update(self.positions.numpy().tobytes())
        return digest.hexdigest()
