"""Which image files cannot be decoded; without PyTorch."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ant_lightning.data.pictures import open_picture
from ant_lightning.errors import ConfigError, FileError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def image_faults(paths: Iterable[Path]) -> dict[Path, str]:
    """Decode every image; returns the error of each that fails.

    What the first look of the command line has decoded is not decoded again.
    """
    paths = list(paths)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # decoding releases the GIL
        faults = zip(paths, pool.map(_fault, paths), strict=True)
        return {path: fault for path, fault in faults if fault is not None}


def report_of(broken: Mapping[Path, str]) -> str:
    """How many images are broken, and the errors of some."""
    listed = "; ".join(list(broken.values())[:5])
    more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
    images = "image" if len(broken) == 1 else "images"
    return f"{len(broken)} broken {images}: {listed}{more}"


def broken_images_error(broken: Mapping[Path, str]) -> ConfigError:
    """The error for images that are broken where none may be."""
    return ConfigError(
        f"validate_images: {report_of(broken)} (--data.validate_images skip leaves them out)"
    )


def _fault(path: Path) -> str | None:
    try:
        found = path.stat()
    except OSError:  # a link to nothing: decoding says so
        return _decoded(path, -1, -1)
    return _decoded(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=10_000)
def _decoded(path: Path, size: int, time: int) -> str | None:
    del size, time  # a file that has changed is decoded again
    try:
        open_picture(path, channels=3)
    except FileError as error:
        return str(error)
    return None
