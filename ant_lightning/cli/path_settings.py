"""Checks that the files and folders which settings name are there, before anything is imported.

The classes check their own as well, but only after imports that take 10 s.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ant_lightning.cli.source_names import needed_arguments_of
from ant_lightning.data.archives.shard_names import shard_files
from ant_lightning.data.image_search import find_images
from ant_lightning.data.pictures import SUFFIXES
from ant_lightning.errors import ConfigError, found_at

if TYPE_CHECKING:
    from collections.abc import Iterable


class _Rule(NamedTuple):
    """What a setting must name.

    Attributes:
        what: In words.
        inside: A file or folder that must lie in it; empty for any folder.
        or_file: Whether a file will do as well.
    """

    what: str
    inside: str = ""
    or_file: bool = False

    def holds(self, path: Path) -> bool:
        inside = path / self.inside
        return inside.exists() if self.inside else path.is_dir() or (self.or_file and path.exists())


_IMAGES = _Rule("a folder of images")
_ARCHIVE = _Rule("a folder or a zip archive", or_file=True)
_CACHE = _Rule("a cache that `ant-lightning encode` wrote", inside="index.json")
_NETWORK = _Rule("a folder with config.json", inside="config.json")
_RULES = {
    "ImageFolderData": {"root": _IMAGES},
    "CaptionFolderData": {"root": _IMAGES, "embeddings": _CACHE},
    "LatentsData": {"cache": _CACHE},
    "EDM2LatentsData": {"path": _ARCHIVE},
    "REPALatentsData": {"root": _Rule("a folder with vae-sd in it", inside="vae-sd")},
    "LightningDiTLatentsData": {"path": _Rule("a folder of latents")},
    "EDMImages": {"path": _ARCHIVE},
    "TextEncoder": {"folder": _NETWORK},
    "InceptionFeatures": {"weights": _Rule("the weights of InceptionV3", or_file=True)},
    "DINOv2Features": {"folder": _NETWORK},
    "CLIPFeatures": {"folder": _NETWORK},
    "DiffusersBackbone": {"folder": _Rule("a folder of diffusers")},
}


def check_paths(places: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
    """Check the paths among the settings of classes.

    Args:
        places: Setting, class and inner settings of each class.

    Raises:
        ConfigError: If there is nothing of its kind, or one that is needed is not given.
    """
    for setting, class_path, inner in places:
        package, _, name = class_path.rpartition(".")
        if package == "torchvision.datasets":
            _check_torchvision(setting, name, inner)
        if package.partition(".")[0] not in {"", "ant_lightning"}:
            continue
        if name == "TarShards" and isinstance(inner.get("shards"), str):
            shard_files(inner["shards"], setting=f"{setting}.shards")
        rules = _RULES.get(name, {})
        missing = [each for each in needed_arguments_of(name) if each not in inner] if rules else []
        if missing:
            raise ConfigError(f"{setting}.{', '.join(missing)}: needed, found nothing")
        for argument, rule in rules.items():
            value = inner.get(argument)
            if not isinstance(value, str):  # the parser says what it must be
                continue
            if not rule.holds(Path(value)):
                at = found_at(Path(value, rule.inside))
                raise ConfigError(f"{setting}.{argument}: must be {rule.what}, {at}")
            if rule is _IMAGES and not _has_image(value):  # it says why
                find_images(value, labels="none", setting=f"{setting}.{argument}")


def _check_torchvision(setting: str, name: str, inner: dict[str, Any]) -> None:
    root = inner.get("root")
    if isinstance(root, str) and not inner.get("download") and not Path(root).is_dir():
        raise ConfigError(
            f"{setting}.root: must be a folder with the files of {name}, {found_at(root)}; "
            f"--{setting}.download true fetches those of most of torchvision's data sets"
        )


def _has_image(folder: str) -> bool:
    """Whether an image lies in the folder or below, not counting what links lead to.

    The first is found at once, where a search for all of ImageNet's takes a while.
    """
    files = (name for _, _, names in os.walk(folder) for name in names)
    return any(Path(name).suffix.lower() in SUFFIXES for name in files)
