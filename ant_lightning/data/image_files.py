"""Which images a folder holds, what class each has, and which of them are broken."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn

from ant_lightning.data.image_search import search_images
from ant_lightning.data.pictures import SUFFIXES, open_picture
from ant_lightning.errors import ConfigError

__all__ = ["ImageFiles", "broken_images", "content_digest", "find_images"]

_MAX_LISTED = 5


@dataclass(frozen=True)
class ImageFiles:
    """Paths in a fixed order, the class name of each (empty without classes)."""

    paths: list[Path]
    class_names: list[str]


def find_images(
    root: str | Path, *, labels: Literal["auto", "folders", "none"], setting: str = "data.root"
) -> ImageFiles:
    """The images below `root`, sorted by path, each once: see `search_images`.

    One warning reports what was skipped.

    Args:
        root: The folder.
        labels: `folders`: the first folder below `root` is an image's class. `none`: no classes,
            whatever the folders. `auto`: `none` if the images lie in `root` itself, else
            `folders`.
        setting: The setting to name in messages.

    Raises:
        ConfigError: If there is no such folder, no image in it, a class without images, or images
            are both in `root` and in folders below it, so that `auto` cannot decide.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise ConfigError(f"{setting}: must be a folder of images, found {folder}")
    content = search_images(folder, setting=setting)
    paths, passed_over = content.images, content.passed_over()
    if not paths:
        kinds = ", ".join(sorted(SUFFIXES))
        others = f", but {passed_over}" if passed_over else ""
        raise ConfigError(f"{setting}: must hold images ({kinds}), found none in {folder}{others}")
    if passed_over:
        rank_zero_warn(f"{setting}: skipped {passed_over}")
    nested = [path for path in paths if path.parent != folder]
    if labels == "auto" and nested and len(nested) < len(paths):
        flat = next(path for path in paths if path.parent == folder)
        raise ConfigError(
            f"data.labels: must be 'folders' or 'none' because {folder} holds images both directly "
            f"({flat.name}) and in folders ({nested[0].relative_to(folder)}), found 'auto'"
        )
    if labels == "none" or (labels == "auto" and not nested):
        return ImageFiles(paths, [])
    if len(nested) < len(paths):
        flat = next(path for path in paths if path.parent == folder)
        raise ConfigError(
            f"data.labels: 'folders' needs every image in the folder of its class, found {flat}"
        )
    names = [path.relative_to(folder).parts[0] for path in paths]
    without = sorted(set(content.folders) - set(names))
    if without:
        why = content.passed_over(below=folder / without[0]) or "it holds no picture files"
        raise ConfigError(
            f"{setting}: every folder in {folder} is a class and must hold images, found none in "
            f"{', '.join(without[:_MAX_LISTED])} ({without[0]}: {why}); move elsewhere what is no "
            "class"
        )
    return ImageFiles(paths, names)


def broken_images(paths: list[Path]) -> dict[Path, str]:
    """Decode every image and give what is wrong with those that fail.

    With several ranks each decodes its share, and all get the same answer.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    mine = paths[dist.get_rank() :: ranks] if ranks > 1 else paths
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # decoding releases the GIL
        found = {
            path: reason
            for path, reason in zip(mine, pool.map(_fault, mine), strict=True)
            if reason is not None
        }
    if ranks == 1:
        return found
    parts: list[dict[Path, str]] = [{}] * ranks
    dist.all_gather_object(parts, found)
    return dict(sorted((k, v) for part in parts for k, v in part.items()))


def content_digest(paths: list[Path]) -> str:
    """A digest of every byte of the files, in the given order."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # hashing releases the GIL
        return hashlib.sha256(b"".join(pool.map(_file_digest, paths))).hexdigest()


def report(broken: dict[Path, str]) -> str:
    """The first broken images, and how many there are."""
    listed = "; ".join(list(broken.values())[:_MAX_LISTED])
    more = len(broken) - _MAX_LISTED
    return f"{len(broken)} broken images: {listed}" + (f"; and {more} more" if more > 0 else "")


def split(num_images: int, *, num_held_out: int, order: torch.Generator) -> tuple[list[int], ...]:
    """Positions of the training and of the held-out images, both in the order of the files."""
    chosen = torch.randperm(num_images, generator=order)[:num_held_out].tolist()
    held_out = set(chosen)
    return [i for i in range(num_images) if i not in held_out], sorted(held_out)


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _fault(path: Path) -> str | None:
    try:
        open_picture(path, channels=3)
    except ConfigError as error:
        return str(error)
    return None
