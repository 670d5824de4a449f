"""The files of a latent cache: an index, and shards of moments and labels as safetensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ant_lightning.data.latents.space import LatentSpace
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.json_file import read_json
from ant_lightning.files.safetensors_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "index.json"
_VERSION = 2  # version 0.1 wrote format 1: numpy arrays, without the identity of the images
_MAX_SHARDS = 2**20


@dataclass(frozen=True, kw_only=True)
class CacheIndex:
    """What a cache holds. All shards of a split have `shard_size` images, except the last.

    Attributes:
        space: The latent space of the first stage that encoded the images.
        image_shape: `(c, h, w)` of the images.
        moments_shape: `(c, h, w)` of the moments.
        dtype: `float32` or `float16`.
        views: 2 if mirrored images were encoded too, else 1.
        num_classes: Number of classes; 0 for images without labels.
        num_images: Number of images in each split, `train` and `held_out`.
        shard_size: Number of images in a shard.
        identity: What determines the images; see `ImageDataModule.identity`.

    Raises:
        ValueError: If a value is impossible; `read_index` turns this into a `FileError`.
    """

    space: LatentSpace
    image_shape: tuple[int, int, int]
    moments_shape: tuple[int, int, int]
    dtype: Literal["float32", "float16"]
    views: int
    num_classes: int
    num_images: dict[str, int]
    shard_size: int
    identity: dict[str, Any]

    def __post_init__(self) -> None:
        # The upper bounds keep a damaged index from claiming more shards than memory can list.
        _check("image_shape", self.image_shape, length=3, least=1, most=2**16)
        _check("moments_shape", self.moments_shape, length=3, least=1, most=2**16)
        _check("views", [self.views], least=1, most=2)
        _check("num_classes", [self.num_classes], least=0, most=2**40)
        _check("shard_size", [self.shard_size], least=1, most=2**40)
        counts = [self.num_images[split] for split in ("train", "held_out")]
        _check("num_images", counts, length=2, least=1, most=_MAX_SHARDS * self.shard_size)
        texts = self.space.fingerprint, self.space.source, self.dtype
        if self.dtype not in ("float32", "float16") or [*map(type, texts)] != [str] * 3:
            raise ValueError(f"dtype {self.dtype}, space {self.space}")

    def as_json(self) -> dict[str, Any]:
        """The content of the index file, with the identity of the images as `images.NAME`."""
        content = asdict(self)
        identity = {f"images.{name}": value for name, value in content.pop("identity").items()}
        return {"format_version": _VERSION, **content, **identity}

    def shards(self, split: str) -> list[Shard]:
        """The shards of a split, `train` or `held_out`."""
        count, size = self.num_images[split], self.shard_size
        return [
            Shard(self, split, number, min(size, count - number * size))
            for number in range(-(-count // size))
        ]


@dataclass(frozen=True)
class Shard:
    """One file of a cache."""

    index: CacheIndex
    split: str
    number: int
    num_images: int

    def write(self, folder: Path, *, moments: Tensor, labels: Tensor) -> None:
        """Write the file atomically."""
        write_tensors(self._path(folder), {"moments": moments, "labels": labels}, self._metadata)

    def read(self, folder: Path) -> tuple[Tensor, Tensor]:
        """Map `moments [n, views, c, h, w]` and `labels [n]` into memory.

        Raises:
            FileError: If the file is missing or damaged, has another shape or dtype, or belongs to
                another cache.
        """
        n, index = self.num_images, self.index
        shape = (n, index.views, *index.moments_shape)
        expected = {"moments": (getattr(torch, index.dtype), shape), "labels": (torch.int64, (n,))}
        # Only the header is read; the values stay in the file until they are used.
        try:
            tensors, _ = read_tensors(self._path(folder), expected, self._metadata)
        except FileError as error:
            raise FileError(f"{error}; encode again, finished shards are kept") from error
        return tensors["moments"], tensors["labels"]

    def _path(self, folder: Path) -> Path:
        return folder / f"{self.split}_{self.number:05d}.safetensors"

    @property
    def _metadata(self) -> dict[str, object]:
        """What tells this shard from others of the same shape: encoder, split and number."""
        fingerprint = self.index.space.fingerprint
        return {"first_stage": fingerprint, "split": self.split, "shard": self.number}


def read_index(folder: Path) -> CacheIndex:
    """Read the index of a cache.

    Raises:
        FileError: If the folder has no index, or one that is damaged or has another version.
    """
    path = folder / INDEX_NAME
    content = read_json(path, kind=dict)
    version = content.pop("format_version", None)
    if version != _VERSION:
        raise FileError(
            f"{path}: format_version must be {_VERSION}, found {version!r:.20}; encode the images "
            "again into another folder"
        )
    images = {name for name in content if name.startswith("images.")}
    identity = {name.removeprefix("images."): content.pop(name) for name in images}
    try:
        content["space"] = LatentSpace(**content["space"])
        for name in ("image_shape", "moments_shape"):
            content[name] = tuple(content[name])
        return CacheIndex(**content, identity=identity)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise FileError(f"{path}: must be the index of a latent cache, found {error}") from error


def check_first_stage(cache: LatentSpace, ours: LatentSpace, folder: Path) -> None:
    """Check that a cache was encoded by our first stage, if its weights are known.

    Raises:
        ConfigError: If the fingerprints differ; names both first stages.
    """
    if cache.fingerprint and cache.fingerprint != ours.fingerprint:
        raise ConfigError(
            f"first_stage: must be the one that the latent cache {folder} was made by, {cache}, "
            f"found {ours}"
        )


def _check(name: str, values: Any, *, length: int = 1, least: int, most: int) -> None:  # noqa: ANN401
    """Check that `values`, as read from JSON, are integers from `least` to `most`."""
    if len(values) != length or any(type(v) is not int or not least <= v <= most for v in values):
        raise ValueError(f"{name} {str(values)[:100]}")
