"""The files of a latent cache: an index, and shards of moments and labels as plain arrays."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ant_lightning.data.latents.space import LatentSpace
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.atomic import write_atomically
from ant_lightning.files.identity import differences
from ant_lightning.files.json_file import read_json
from ant_lightning.files.npy import map_npy

__all__ = [
    "IDENTITY_NAME",
    "CacheIndex",
    "Split",
    "check_first_stage",
    "check_index",
    "read_identity",
    "read_index",
    "save_array",
    "shard_array",
    "shard_path",
    "write_index",
]

Split = Literal["train", "held_out"]
FORMAT_VERSION = 1
IDENTITY_NAME = "identity.json"  # identity of the images; everything else is in the index
_NAME = "index.json"
_MAX_SIDE = 2**16
_MAX_IMAGES = 2**40
_MAX_SHARDS = 2**20
_MAX_SCALE = 1e30


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
        FileError: Naming the file, if it is missing, truncated or of another shape or type.
    """
    start, stop = index.shards(split)[shard]
    wanted = {
        "moments": ((stop - start, index.views, *index.moments_shape), np.dtype(index.dtype)),
        "labels": ((stop - start,), np.dtype(np.int64)),
    }[what]
    path = shard_path(folder, split, shard, what)
    return map_npy(
        path,
        shape=wanted[0],
        dtype=wanted[1],
        setting="latent cache",
        hint="encode again, finished shards are kept",
    )


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


def check_index(folder: Path, index: CacheIndex) -> bool:
    """Compare with the folder's index; returns whether it has one.

    Raises:
        ConfigError: If the folder has a cache of something else.
    """
    if not (folder / _NAME).exists():
        return False
    found = read_index(folder)
    check_first_stage(found.space, index.space, folder)
    # The fingerprints agree; the path of the first stage may differ.
    other = differences(asdict(replace(found, space=index.space)), asdict(index))
    if other:
        name, (theirs, ours) = next(iter(other.items()))
        raise ConfigError(
            f"cache.output: {folder} has a cache whose {name} is {theirs}, found {ours}; use "
            "another folder"
        )
    return True


def write_index(folder: Path, index: CacheIndex) -> None:
    """Write the index of a cache atomically."""
    text = json.dumps({"format_version": FORMAT_VERSION, **asdict(index)}, indent=1)
    write_atomically(folder / _NAME, lambda file: file.write(text.encode()))


def read_identity(folder: Path) -> dict[str, Any] | None:
    """The identity of a cache's images; None for a cache of version 0.1, which has none."""
    path = folder / IDENTITY_NAME
    return read_json(path, kind=dict, setting="latent cache") if path.exists() else None


def read_index(folder: Path) -> CacheIndex:
    """Read the index of a cache.

    Raises:
        FileError: If the folder has none, or one that is damaged or of another version.
    """
    path = folder / _NAME
    content = read_json(path, kind=dict, setting="latent cache")
    try:
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise FileError(
                f"latent cache: {path} must have format_version {FORMAT_VERSION}, found {version}"
            )
        space = LatentSpace(**content.pop("space"))
        for name in ("image_shape", "moments_shape"):
            content[name] = tuple(content[name])
        index = CacheIndex(space=space, **content)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise FileError(f"latent cache: cannot read {path} ({error})") from error
    wrong = _impossible(index)
    if wrong:
        raise FileError(
            f"latent cache: {path} must say {wrong}, found {getattr(index, wrong.split()[0])}"
        )
    return index


def _impossible(index: CacheIndex) -> str:
    """What an index says that no cache can have; empty if it could be one."""

    def sizes(values: Any, *, least: int, most: int) -> bool:  # noqa: ANN401 - from a file
        return all(type(each) is int and least <= each <= most for each in values)

    def is_shape(values: Any) -> bool:  # noqa: ANN401 - from a file
        return len(values) == 3 and sizes(values, least=1, most=_MAX_SIDE)

    counts = index.num_images
    counted = isinstance(counts, dict) and set(counts) == {"train", "held_out"}
    space = index.space
    texts = isinstance(space.fingerprint, str) and isinstance(space.source, str)
    # Compared and not converted: a whole number in JSON may be larger than any float.
    numbers = all(
        type(x) in {int, float} and abs(x) < _MAX_SCALE for x in (space.scale, space.shift)
    )
    whole = sizes([index.shard_size], least=1, most=_MAX_IMAGES)
    rules = {
        f"space of kind kl or vq, of texts and of numbers below {_MAX_SCALE:g}": texts
        and numbers
        and space.kind in ("kl", "vq"),
        f"image_shape (c, h, w) of sides 1 .. {_MAX_SIDE}": is_shape(index.image_shape),
        f"moments_shape (c, h, w) of sides 1 .. {_MAX_SIDE}": is_shape(index.moments_shape),
        "dtype float32 or float16": index.dtype in ("float32", "float16"),
        "views 1 or 2": sizes([index.views], least=1, most=2),
        "num_classes of 0 or more": sizes([index.num_classes], least=0, most=_MAX_IMAGES),
        "shard_size of 1 or more": whole,
        f"num_images of train and held_out, in at most {_MAX_SHARDS} shards": counted
        and whole
        and sizes(counts.values(), least=0, most=_MAX_SHARDS * index.shard_size),
    }
    return next((rule for rule, holds in rules.items() if not holds), "")


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
