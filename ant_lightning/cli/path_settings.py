"""Checks that the files and folders which settings name are there, before anything is imported.

The classes check their own as well, but only after imports that take 10 s.
"""

from __future__ import annotations

import tarfile
import warnings
import zipfile
from contextlib import suppress
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from ant_lightning.cli.source_names import needed_arguments_of
from ant_lightning.data.archives.shard_names import shard_files
from ant_lightning.data.image_faults import broken_images_error, image_faults
from ant_lightning.data.image_search import find_images, first_images
from ant_lightning.errors import ConfigError, FileError, found_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# What is decoded here of a folder of images; the data module decodes the rest.
_FEW_IMAGES, _FEW_BYTES, _FEW_SHARDS = 1000, 2**26, 100


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
            shards = shard_files(inner["shards"], setting=f"{setting}.shards")
            for shard in shards[:_FEW_SHARDS]:
                check_archive(shard)
        for value in inner.values():
            check_archive(value)
        rules = _RULES.get(name, {})
        missing = [each for each in needed_arguments_of(name) if each not in inner] if rules else []
        if missing:
            option = f"--{setting}.{missing[0]} {'PATH' if missing[0] in rules else 'VALUE'}"
            raise ConfigError(f"{setting}.{', '.join(missing)}: needed, found nothing ({option})")
        for argument, rule in rules.items():
            value = inner.get(argument)
            if not isinstance(value, str):  # the parser says what it must be
                continue
            if not rule.holds(Path(value)):
                at = found_at(Path(value, rule.inside))
                raise ConfigError(f"{setting}.{argument}: must be {rule.what}, {at}")
            if rule is _IMAGES:
                _check_images(setting, name, inner)


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(0, path.stat().st_size - 4))
        return start == file.read(4) == b"PAR1"


# Whether a file begins and ends as its suffix says, which shows most downloads that broke off.
_IS_WHOLE: dict[str, Callable[[Path], bool]] = {
    ".npz": zipfile.is_zipfile,
    ".parquet": _is_parquet,
    ".tar": tarfile.is_tarfile,
    ".zip": zipfile.is_zipfile,
}


def check_archive(value: object) -> None:
    """Check the file that a setting names, if its suffix is that of an archive.

    Raises:
        FileError: If it is cut off, or a file of another kind.
    """
    path = Path(value) if isinstance(value, str | Path) else Path()
    is_whole = _IS_WHOLE.get(path.suffix.lower())
    if is_whole and path.is_file() and not is_whole(path):
        kind, size = path.suffix.lower()[1:], path.stat().st_size
        raise FileError(f"{path}: must be a whole {kind} file, found {size} bytes that are not")


def check_sizes(images: str, data: dict[str, Any]) -> None:
    """Check that stored images have the size to which a folder of images is cropped.

    Raises:
        ConfigError: If one has another; names it and says how many others there are.
    """
    size, folder = data.get("image_size"), Path(images)
    if str(data.get("class_path")).rpartition(".")[2] != "ImageFolderData" or type(size) is not int:
        return
    wrong = []
    for path in islice(first_images(folder), _FEW_IMAGES) if folder.is_dir() else ():
        with suppress(OSError), Image.open(path) as file:  # the command says what is damaged
            wrong += [(path, file.size)] if file.size != (size, size) else []
    if wrong:
        path, (width, height) = min(wrong)
        others = f", and {len(wrong) - 1} more of other sizes" if wrong[1:] else ""
        raise ConfigError(
            f"images: must be {size} x {size} (data.image_size), found {width} x {height} in "
            f"{path}{others}"
        )


def _check_torchvision(setting: str, name: str, inner: dict[str, Any]) -> None:
    root = inner.get("root")
    if isinstance(root, str) and not inner.get("download") and not Path(root).is_dir():
        raise ConfigError(
            f"{setting}.root: must be a folder with the files of {name}, {found_at(root)}; "
            f"--{setting}.download true fetches those of most of torchvision's data sets"
        )


def _check_images(setting: str, name: str, inner: dict[str, Any]) -> None:
    """Check what is quick to check of a folder of images: all of a small one."""
    root = Path(inner["root"])
    labels: Any = "none" if name == "CaptionFolderData" else inner.get("labels", "auto")
    found = list(islice(first_images(root), _FEW_IMAGES + 1))
    try:
        if len(found) <= _FEW_IMAGES and labels in {"auto", "folders", "none"}:
            with warnings.catch_warnings(action="ignore"):  # the data say it again
                find_images(root, labels=labels)
        if inner.get("validate_images", "auto") in {"auto", "raise"}:
            sizes = accumulate(path.stat().st_size for path in found)
            few = [path for path, size in zip(found, sizes, strict=True) if size <= _FEW_BYTES]
            broken = image_faults(sorted(few[:_FEW_IMAGES]))
            if broken:
                raise broken_images_error(broken)
    except ConfigError as error:
        raise ConfigError(f"{setting}.{error}") from error
