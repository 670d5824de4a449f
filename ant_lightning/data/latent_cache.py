"""The files of a latent cache: an index, and shards of moments and labels as plain arrays."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ant_lightning.data.latent_space import LatentSpace
from ant_lightning.errors import ConfigError

__all__ = [
    "CacheIndex",
    "Split",
    "check_first_stage",
    "read_index",
    "save_array",
    "shard_array",
    "shard_path",
    "write_index",
]

Split = Literal["train", "held_out"]
FORMAT_VERSION = 1
_NAME = "index.json"


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
    """

    space: LatentSpace
    image_shape: tuple[int, int, int]
    moments_shape: tuple[int, int, int]
    dtype: Literal["float32", "float16"]
    views: int
    num_classes: int
    num_images: dict[str, int]
    shard_size: int

    def shards(self, split: Split) -> list[tuple[int, int]]:
        """`(start, stop)` of each shard."""
        count, size = self.num_images[split], self.shard_size
        return [(start, min(start + size, count)) for start in range(0, count, size)]


def shard_array(folder: Path, index: CacheIndex, split: Split, shard: int, what: str) -> np.ndarray:
    """One array of a shard, mapped into memory: `moments [n, views, c, h, w]` or `labels [n]`.

    Raises:
        ConfigError: Naming the file, if it is missing, truncated or of another shape or type.
    """
    start, stop = index.shards(split)[shard]
    wanted = {
        "moments": ((stop - start, index.views, *index.moments_shape), np.dtype(index.dtype)),
        "labels": ((stop - start,), np.dtype(np.int64)),
    }[what]
    path = shard_path(folder, split, shard, what)
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"latent cache: {path} is missing, truncated or damaged ({error}); encode again, "
            "finished shards are kept"
        ) from error
    if (array.shape, array.dtype) != wanted:
        raise ConfigError(
            f"latent cache: {path} must hold {wanted[1]} of shape {list(wanted[0])}, found "
            f"{array.dtype} of shape {list(array.shape)}"
        )
    return array


def shard_path(folder: Path, split: Split, shard: int, what: str) -> Path:
    """Where an array of a shard lies."""
    return folder / f"{split}_{shard:05d}_{what}.npy"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array; the file appears whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    with partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_index(folder: Path, index: CacheIndex) -> None:
    """Write the index of a cache, or check the one that is there.

    Raises:
        ConfigError: If the folder has a cache of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _NAME).exists():
        found = read_index(folder)
        check_first_stage(found.space, index.space, folder)
        # The fingerprints agree; the path by which a first stage was named may differ.
        found = replace(found, space=index.space)
        if found != index:
            ours, theirs = asdict(index), asdict(found)
            name = next(name for name in ours if ours[name] != theirs[name])
            raise ConfigError(
                f"output: {folder} has a cache whose {name} is {theirs[name]}, found "
                f"{ours[name]}; use another folder"
            )
        return
    text = json.dumps({"format_version": FORMAT_VERSION, **asdict(index)}, indent=1)
    partial = folder / f"{_NAME}.{os.getpid()}.part"
    partial.write_text(text)
    partial.replace(folder / _NAME)


def read_index(folder: Path) -> CacheIndex:
    """Read the index of a cache.

    Raises:
        ConfigError: If the folder has none, or one that is damaged or of another version.
    """
    path = folder / _NAME
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"latent cache: {path} must have format_version {FORMAT_VERSION}, found {version}"
            )
        space = LatentSpace(**content.pop("space"))
        for name in ("image_shape", "moments_shape"):
            content[name] = tuple(content[name])
        index = CacheIndex(space=space, **content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"latent cache: cannot read {path} ({error})") from error
    if index.dtype not in {"float32", "float16"} or min(index.shard_size, index.views) < 1:
        raise ConfigError(
            f"latent cache: {path} must say float32 or float16 and sizes of at least 1, found "
            f"{index.dtype}, {index.shard_size} and {index.views}"
        )
    return index


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
