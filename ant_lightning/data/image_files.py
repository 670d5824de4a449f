"""Which images a folder holds, what class each has, and which of them are broken."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from ant_lightning.data.pictures import SUFFIXES, open_picture
from ant_lightning.errors import ConfigError

__all__ = ["ImageFiles", "broken_images", "find_images"]

_MAX_LISTED = 5


@dataclass(frozen=True)
class ImageFiles:
    """Paths in a fixed order, the class name of each (empty without classes)."""

    paths: list[Path]
    class_names: list[str]


def find_images(root: str | Path, *, labels: Literal["auto", "folders", "none"]) -> ImageFiles:
    """The images below `root`, sorted by path; hidden files and folders are passed over.

    Args:
        root: The folder.
        labels: `folders`: the first folder below `root` is an image's class. `none`: no classes,
            whatever the folders. `auto`: `none` if the images lie in `root` itself, else
            `folders`.

    Raises:
        ConfigError: If there is no such folder, no image in it, or images lie both in `root` and
            in folders below it, so that `auto` cannot tell.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise ConfigError(f"data.root: must be a folder of images, found {folder}")
    paths = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found = (Path(parent) / name for name in names if not name.startswith("."))
        paths += [path for path in found if path.suffix.lower() in SUFFIXES]
    paths.sort()
    if not paths:
        kinds = ", ".join(sorted(SUFFIXES))
        raise ConfigError(f"data.root: must hold images ({kinds}), found none in {folder}")
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
    return ImageFiles(paths, [path.relative_to(folder).parts[0] for path in paths])


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


def _fault(path: Path) -> str | None:
    try:
        open_picture(path, channels=3)
    except ConfigError as error:
        return str(error)
    return None
