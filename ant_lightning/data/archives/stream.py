"""A data module for remote tar shards that are read as a stream."""

from __future__ import annotations

import random
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ant_lightning.data.archives.entries import image_entry, label_of_entries
from ant_lightning.data.archives.shard_names import expanded_braces
from ant_lightning.data.batch import Batch
from ant_lightning.data.dataset import ImageDataset
from ant_lightning.data.folder_images import is_flipped
from ant_lightning.data.loader import ShuffledLoader
from ant_lightning.data.map_style import MapStyleData
from ant_lightning.data.module import ImageDataModule
from ant_lightning.data.workers import worker_settings
from ant_lightning.errors import ConfigError, DataLoadingError, check_at_least, extra_for
from ant_lightning.randomness import keyed_generator, keyed_seed
from ant_lightning.sizes import Size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from ant_lightning.data.pictures import Crop


class StreamData(ImageDataModule):
    """Tar shards in WebDataset's format, read one after the other, for data in object storage.

    A stream promises less than `TarShards`, which is better where files can be read at any place.
    Held: in each pass over the data one loading process of one rank reads a shard, so that
    ranks see different images; what comes depends on (seed, ranks, loading processes, position)
    alone. Not held: loading processes begin their next pass without waiting for each other, and an
    epoch is `num_images` images, not each sample once; images are shuffled within `buffer` only;
    a resumed run begins a new pass, with other images than without a stop.

    Needs `pip install 'ant-lightning[archives]'`.

    Args:
        shards: URLs or paths, with ranges (`https://host/{0000..0099}.tar`). What webdataset opens:
            files, `http`, `s3`, `gs`, and `pipe:COMMAND`, which runs the command.
        held_out: A map-style data set of images that are not in the stream, such as `TarShards`:
            validation, grids and FID. Size, channels and classes are those of this data set.
        num_images: Images of an epoch.
        batch_size: Images of one optimizer step, over all ranks.
        buffer: Images that each loading process holds to draw the next one from.
        image_size: Height and width that images are cropped and resized to; by default those of
            the first held-out image, which all must have then.
        num_classes: Number of classes; by default what `held_out` says. 0 ignores labels.
        image: As in `TarShards`.
        label: As in `TarShards`.
        crop: `center_adm` as ADM and DiT crop, or `resize`.
        flip: Whether training images are mirrored in half of the passes.
        num_workers: Loading processes of each rank; by default four, or the cores of this machine.
        seed: Order of the shards and images, and flips; by default the seed of the run.

    Raises:
        ConfigError: If webdataset is not installed, or there are fewer shards than processes.
        DataLoadingError: During iteration, if a shard cannot be read or a sample does not fit.

    Examples:
        With `--config folder/dit_32`: `--data StreamData --data.shards 's3://bucket/{000..099}.tar'
        --data.held_out {class_path: ant_lightning.TarShards, init_args: {shards: val.tar}}
        --data.num_images 1000000 --data.batch_size 256`.

        >>> from torch.utils.data import TensorDataset
        >>> from ant_lightning import StreamData
        >>> held_out = TensorDataset(torch.zeros(4, 3, 8, 8))
        >>> data = StreamData("{0..3}.tar", held_out=held_out, num_images=50, batch_size=8)
        >>> data.shape_and_classes(), len(data.train_dataloader())
        (((3, 8, 8), 0), 6)
    """

    identity_settings = ("shards", "crop")

    def __init__(
        self,
        shards: str | list[str],
        *,
        held_out: Dataset,
        num_images: int,
        batch_size: int,
        buffer: int = 1000,
        image_size: Size | None = None,
        num_classes: int | None = None,
        image: str | None = None,
        label: str | None = None,
        crop: Crop = "center_adm",
        flip: bool = True,
        num_workers: int | None = None,
        seed: int | None = None,
    ) -> None:
        with extra_for("shards", "archives"):
            import webdataset  # noqa: F401, PLC0415 - an extra
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_at_least(batch_size, num_images=num_images)
        check_at_least(1, buffer=buffer)
        patterns = [shards] if isinstance(shards, str) else shards
        self.shards = [each for pattern in patterns for each in expanded_braces(pattern)]
        self.num_images = num_images
        self.buffer = buffer
        self.image, self.label = image, label
        self.crop = crop
        self.flip = flip
        self.local = MapStyleData(
            held_out,
            held_out=held_out,
            batch_size=batch_size,
            image_size=image_size,
            num_classes=num_classes,
            crop=crop,
            num_workers=num_workers,
            seed=seed,
        )
        self.image_shape = self.local.image_shape
        self.num_classes = self.local.num_classes

    def prepare(self) -> tuple[ImageDataset, ImageDataset]:
        """The held-out images; those of the stream cannot be read by number."""
        return _Remote(self.num_images), self.local.held_out_images

    def digests(self, known: Mapping[str, Any]) -> dict[str, str]:
        """Those of the held-out images."""
        return self.local.digests(known)

    def train_dataloader(self) -> ShuffledLoader:
        """The stream of this rank.

        Raises:
            ConfigError: If there are fewer shards than loading processes of all ranks.
        """
        rank, world_size = self._ranks()
        if self._overfit_batches():
            raise ConfigError(
                "trainer.overfit_batches: must be 0 with a stream, whose batches do not recur, "
                f"found {self._overfit_batches()}"
            )
        readers = world_size * max(1, self.num_workers)
        if len(self.shards) < readers:
            raise ConfigError(
                f"num_workers: the {readers} loading processes of all ranks must be at most the "
                f"{len(self.shards)} shards, found {self.num_workers} on each of {world_size} ranks"
            )
        return _StreamLoader(self, rank, world_size)

    def converted(self, sample: Mapping[str, Any]) -> tuple[Tensor, int]:
        """Image and label of what webdataset reads.

        Raises:
            DataLoadingError: If the sample does not fit.
        """
        names = [name for name in sample if not name.startswith("__")]
        try:
            content = sample[image_entry(names, self.image)]
            image = self.local.converted(content, self.image_shape[0])
            label = label_of_entries(names, self.label, sample.__getitem__)
            label = 0 if not self.num_classes else label
            if label is None or not 0 <= label < max(1, self.num_classes):
                raise ValueError(f"a label from 0 to {self.num_classes - 1}, found {label}")
            if tuple(image.shape) != self.image_shape:
                raise ValueError(f"shape {list(self.image_shape)}, found {list(image.shape)}")
        except ValueError as error:  # a ConfigError too
            raise DataLoadingError(
                f"{sample['__url__']}: sample {sample['__key__']} must have {error}"
            ) from error
        return image, label


class _Remote(ImageDataset):
    """Stands for images that cannot be read by number."""

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images

    def __len__(self) -> int:
        return self._num_images

    def load(self, indices: list[int], *, epoch: int | None) -> Batch:
        raise ConfigError(
            "data: a stream has no training images by number, so give GenerationMetrics "
            "with_train: false and a reference file"
        )


class _StreamLoader(ShuffledLoader):
    """Batches of a stream; counts them as `ShuffledLoader` does."""

    def __init__(self, data: StreamData, rank: int, world_size: int) -> None:
        super().__init__(
            data.train_images,
            batch_size=data.batch_size,
            seed=data.seed,
            rank=rank,
            world_size=world_size,
            num_workers=data.num_workers,
        )
        self._data = data
        self._ranks = rank, world_size

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the count; the stream begins a new pass."""
        self.position = state["position"] * state["batch_size"] // self.batch_size
        self._iterator = None
        rank_zero_info(
            "shards: the stream begins a new pass, with other images than without a stop"
        )

    def _stream(self) -> Iterator[Batch]:
        batches = _Batches(self._data, self._ranks, first=self.position)
        return iter(DataLoader(batches, batch_size=None, **worker_settings(self._data.num_workers)))


class _Batches(IterableDataset[Batch]):
    """The endless batches of one rank; each loading process reads shards of its own."""

    def __init__(self, data: StreamData, ranks: tuple[int, int], *, first: int) -> None:
        self._data, self._ranks, self._first = data, ranks, first

    def __iter__(self) -> Iterator[Batch]:
        import webdataset  # noqa: PLC0415 - an extra
        from webdataset.tariterators import (  # noqa: PLC0415
            group_by_keys,
            tar_file_expander,
        )

        data, (rank, world_size), info = self._data, self._ranks, get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader, readers = rank * workers + worker, world_size * workers
        seed = keyed_seed(data.seed, "stream", self._first, reader)
        files = tar_file_expander(self._opened(reader, readers))
        samples = group_by_keys(files)
        samples = webdataset.shuffle(data.buffer, rng=random.Random(seed))(samples)
        size = data.batch_size // world_size
        rows: list[tuple[Tensor, int, int]] = []
        for count, sample in enumerate(_readable(samples)):
            image, label = data.converted(sample)
            index = keyed_seed(0, f"{sample['__url__']}/{sample['__key__']}")
            if is_flipped(data.seed if data.flip else None, self._first + count, index):
                image = image.flip(-1)
            rows.append((image, label, index))
            if len(rows) == size:
                images, labels, indices = zip(*rows, strict=True)
                yield Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices))
                rows = []

    def _opened(self, reader: int, readers: int) -> Iterator[dict[str, Any]]:
        """The shards of one process: in each pass another part of another permutation."""
        from webdataset.gopen import gopen  # noqa: PLC0415

        data, number = self._data, 0
        while True:
            keys = (self._first, number)
            generator = keyed_generator(data.seed, "shards", *keys)
            order = torch.randperm(len(data.shards), generator=generator).tolist()
            for url in (data.shards[shard] for shard in order[reader::readers]):
                with closing(
                    gopen(url)
                ) as stream:  # webdataset leaves it open if not read to its end
                    yield {"url": url, "stream": stream}
            number += 1


def _readable(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        yield from samples
    except Exception as error:  # a network, a program or a damaged archive fails in many ways
        message = " ".join(str(error).split())
        raise DataLoadingError(
            f"shards: must be readable tar files, found {type(error).__name__}: {message}"
        ) from error
