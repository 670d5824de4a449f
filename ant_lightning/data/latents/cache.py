"""The files of a latent cache: an index, and shards of moments and labels as safetensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ant_lightning.data.latents.space import LatentSpace
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.json_file import read_json, write_json
from ant_lightning.files.safetensors_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "INDEX_NAME",
    "CacheIndex",
    "Split",
    "check_first_stage",
    "read_index",
    "read_shard",
    "write_index",
    "write_shard",
]

Split = Literal["train", "held_out"]
INDEX_NAME = "index.json"
_VERSION = 2
_VERSION_OF_0_1 = 1  # moments and labels in npy files of their own, no identity
_MAX_SHARDS = 2**20


@dataclass(frozen=True, kw_only=True)
class CacheIndex:
    """What a cache holds; all shards but the last of a split have `shard_size` images.

    Attributes:
        space: The first stage that made it.
        image_shape: `(c, h, w)` of the images.
        moments_shape: `(c, h, w)` of the moments.
        dtype: `float32` or `float16`.
        views: 2 with the mirrored images, else 1.
        num_classes: 0 for images without labels.
        num_images: Images of each split.
        shard_size: Images of a shard.
        identity: What determines the images, see `ImageDataModule.identity`.
        format_version: 2, or 1 for a cache of version 0.1.

    Raises:
        ValueError: If a value is one that no cache can have.
    """

    space: LatentSpace
    image_shape: tuple[int, int, int]
    moments_shape: tuple[int, int, int]
    dtype: Literal["float32", "float16"]
    views: int
    num_classes: int
    num_images: dict[str, int]
    shard_size: int
    identity: dict[str, Any] | None = None
    format_version: int = _VERSION

    def __post_init__(self) -> None:
        def check(name: str, holds: bool) -> None:
            if not holds:
                raise ValueError(f"{name} {str(getattr(self, name))[:100]}")

        # The largest sides and counts keep a damaged index from asking for all memory.
        check("format_version", self.format_version in (_VERSION_OF_0_1, _VERSION))
        check("space", isinstance(self.space.fingerprint, str))
        check("space", isinstance(self.space.source, str))
        check("image_shape", _are_counts(self.image_shape, 3, least=1, most=2**16))
        check("moments_shape", _are_counts(self.moments_shape, 3, least=1, most=2**16))
        check("dtype", self.dtype in ("float32", "float16"))
        check("views", _are_counts([self.views], 1, least=1, most=2))
        check("num_classes", _are_counts([self.num_classes], 1, least=0, most=2**40))
        check("shard_size", _are_counts([self.shard_size], 1, least=1, most=2**40))
        check("num_images", set(self.num_images) == {"train", "held_out"})
        counts = list(self.num_images.values())
        check("num_images", _are_counts(counts, 2, least=0, most=_MAX_SHARDS * self.shard_size))
        check("identity", self.identity is None or isinstance(self.identity, dict))

    def shards(self, split: Split) -> list[tuple[int, int]]:
        """`(start, stop)` of each shard."""
        count, size = self.num_images[split], self.shard_size
        return [(start, min(start + size, count)) for start in range(0, count, size)]


def read_index(folder: Path) -> CacheIndex:
    """Read the index of a cache.

    Raises:
        FileError: If the folder has none, or one that is damaged or of another version.
    """
    path = folder / INDEX_NAME
    content = read_json(path, kind=dict)
    try:
        content["space"] = LatentSpace(**content["space"])
        for name in ("image_shape", "moments_shape"):
            content[name] = tuple(content[name])
        return CacheIndex(**content)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise FileError(f"{path}: must be the index of a latent cache, found {error}") from error


def write_index(folder: Path, index: CacheIndex) -> None:
    """Write the index of a cache, whole or not at all."""
    write_json(folder / INDEX_NAME, asdict(index))


def read_shard(folder: Path, index: CacheIndex, split: Split, shard: int) -> tuple[Tensor, Tensor]:
    """`moments [n, views, c, h, w]` and `labels [n]` of a shard, mapped into memory.

    Raises:
        FileError: If a file is missing, damaged, or of another shape, type or cache.
    """
    start, stop = index.shards(split)[shard]
    moments = getattr(torch, index.dtype), (stop - start, index.views, *index.moments_shape)
    labels = torch.int64, (stop - start,)
    path = folder / f"{split}_{shard:05d}"
    try:
        if index.format_version == _VERSION_OF_0_1:
            return _map_npy(f"{path}_moments.npy", *moments), _map_npy(
                f"{path}_labels.npy", *labels
            )
        tensors, _ = read_tensors(
            path.with_suffix(".safetensors"),
            {"moments": moments, "labels": labels},
            _metadata(index, split, shard),
        )
    except FileError as error:
        raise FileError(f"{error}; encode again, finished shards are kept") from error
    return tensors["moments"], tensors["labels"]


def write_shard(
    folder: Path, index: CacheIndex, split: Split, shard: int, *, moments: Tensor, labels: Tensor
) -> None:
    """Write a shard, whole or not at all."""
    path = folder / f"{split}_{shard:05d}.safetensors"
    write_tensors(path, {"moments": moments, "labels": labels}, _metadata(index, split, shard))


def check_first_stage(cache: LatentSpace, ours: LatentSpace, folder: Path) -> None:
    """Refuse latents of another first stage.

    Raises:
        ConfigError: Naming both.
    """
    if cache.fingerprint != ours.fingerprint:
        raise ConfigError(
            f"first_stage: the latent cache {folder} was made by {cache.source} (scale "
            f"{cache.scale:g}, shift {cache.shift:g}, fingerprint {cache.fingerprint}), found "
            f"{ours.source} (scale {ours.scale:g}, shift {ours.shift:g}, fingerprint "
            f"{ours.fingerprint})"
        )


def _metadata(index: CacheIndex, split: Split, shard: int) -> dict[str, object]:
    """Tells a shard from those of another place or another first stage."""
    fingerprint = index.space.fingerprint
    return {"format": "latents", "first_stage": fingerprint, "split": split, "shard": shard}


def _map_npy(path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Map an array of a cache of version 0.1 into memory."""
    try:
        tensor = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except Exception as error:  # numpy fails in many ways on a damaged header; none runs code
        raise FileError(f"{path}: must be an npy file of plain numbers, found {error}") from error
    if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
        raise FileError(
            f"{path}: must hold {dtype} of shape {list(shape)}, found {tensor.dtype} of shape "
            f"{list(tensor.shape)}"
        )
    return tensor


def _are_counts(values: Any, length: int, *, least: int, most: int) -> bool:  # noqa: ANN401
    """Whether `values`, as read from JSON, are whole numbers of this range."""
    return len(values) == length and all(type(v) is int and least <= v <= most for v in values)
