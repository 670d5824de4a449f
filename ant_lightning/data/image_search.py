"""Finds the images in a folder, each once, and their classes; reports what was skipped."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn

from ant_lightning.data.pictures import SUFFIXES
from ant_lightning.errors import ConfigError, found_at

if TYPE_CHECKING:
    from collections.abc import Iterator

# What file servers and operating systems create beside the user's files; letters of either case.
_SYSTEM = re.compile(
    r"__macosx|@eadir|@recently-snapshot|@recycle|@tmp|@__thumb|#recycle|#snapshot|\$recycle\.bin|"
    r"lost\+found|system volume information|desktop\.ini|ehthumbs\.db|icon\r|thumbs\.db",
    re.IGNORECASE,
)
# Captions, lists and licences: skipped without a warning, since nobody takes them for images.
_TEXT = frozenset(
    {".csv", ".html", ".json", ".jsonl", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml"}
)


def first_images(root: str | Path) -> Iterator[Path]:
    """The images below `root` in any order, but for those that links to folders lead to.

    The first comes at once, where `find_images` takes a while for all of ImageNet.
    """
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not _is_hidden(name)]
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in SUFFIXES and not _is_hidden(name) and path.is_file():
                yield path


def find_images(
    root: str | Path, *, labels: Literal["auto", "folders", "none"], setting: str = "root"
) -> tuple[list[Path], list[str]]:
    """Find the images below `root`, sorted by path, and the class name of each.

    Links to files and folders elsewhere are followed, but each image counts once. Hidden (`.name`)
    and system entries (`@eaDir`, `__MACOSX`, ...) are skipped silently, and so are text files. One
    warning reports whatever else was skipped.

    Args:
        root: The folder.
        labels: `folders`: the first folder below `root` is an image's class. `none`: no classes,
            whatever the folders. `auto`: `none` if the images lie in `root` itself, else
            `folders`.
        setting: The setting to name in messages.

    Returns:
        The paths, and the class name of each; no names if there are no classes.

    Raises:
        ConfigError: If there is no such folder, no image in it, or a class without images; if
            images lie both in `root` and in folders below it, so that `auto` cannot decide.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise ConfigError(f"{setting}: must be a folder of images, {found_at(folder)}")
    content = _search(folder, setting)
    paths, skipped = content.images, content.skipped(below=folder)
    if not paths:
        kinds = ", ".join(sorted(SUFFIXES))
        others = f", but {skipped}" if skipped else ""
        raise ConfigError(f"{setting}: must hold images ({kinds}), found none in {folder}{others}")
    if skipped:
        rank_zero_warn(f"{setting}: skipped {skipped}")
    flat = [path for path in paths if path.parent == folder]  # these have no class
    if labels == "none" or (labels == "auto" and len(flat) == len(paths)):
        return paths, []
    if flat:
        raise ConfigError(
            f"labels: {labels!r} needs every image in the folder of its class, or, with 'auto', "
            f"every image in {folder}; found both, such as {flat[0]}; use 'none' for no classes"
        )
    names = [path.relative_to(folder).parts[0] for path in paths]
    without = sorted(set(content.folders) - set(names))
    # Otherwise a class that lost its images by mistake would vanish, and renumber the others.
    if without:
        why = content.skipped(below=folder / without[0]) or "it holds no picture files"
        raise ConfigError(
            f"{setting}: every folder in {folder} is a class and must hold images, found none in "
            f"{', '.join(without[:5])} ({without[0]}: {why}); move elsewhere what is no class"
        )
    return paths, names


@dataclass(frozen=True)
class _Content:
    """What a search found below a folder.

    Attributes:
        images: The images, sorted by path. A file that links also lead to appears once, under its
            own path if that is below the folder.
        others: Files in formats that are not read, except text files.
        repeats: Links to files and folders already found, or to a parent folder.
        folders: Names of the folders directly below, without system folders and repeats.
    """

    images: list[Path]
    others: list[Path]
    repeats: list[Path]
    folders: list[str]

    def skipped(self, *, below: Path) -> str:
        """Describe what was skipped below a folder: counts and an example; empty if nothing was."""
        others = [path for path in self.others if path.is_relative_to(below)]
        repeats = [path for path in self.repeats if path.is_relative_to(below)]
        kinds = Counter(path.suffix.lower() or "no ending" for path in others).most_common(5)
        listed = ", ".join(f"{kind} {count}" for kind, count in kinds)
        parts = {
            f"files in formats that are not read: {len(others)} ({listed})": others,
            f"links to what was found already: {len(repeats)}": repeats,
        }
        return "; ".join(f"{what}, such as {paths[0]}" for what, paths in parts.items() if paths)


def _search(root: Path, setting: str) -> _Content:
    """Search `root` and the folders below it.

    Links are followed last, so that a file below `root` keeps its own path, and with it its class.
    """
    content = _Content([], [], [], [])
    top = os.path.realpath(root)
    images: dict[str, Path] = {}  # keyed by real path
    seen: set[str] = set()
    folders = [root]
    folder_links: list[Path] = []
    file_links: list[Path] = []
    while folders or folder_links:
        is_link = not folders
        folder = folder_links.pop(0) if is_link else folders.pop()
        real = os.path.realpath(folder)
        above = (top, os.path.realpath(folder.parent)) if is_link else ()
        # `seen` keeps links from entering a folder twice. A link to a folder above `root`, or above
        # the link, would lead through the whole tree again under other paths.
        if real in seen or any(Path(each).is_relative_to(real) for each in above):
            content.repeats.append(folder)
            continue
        seen.add(real)
        if folder is not root and folder.parent == root:
            content.folders.append(folder.name)
        for entry in _entries(folder, setting):
            path = folder / entry.name
            is_image = path.suffix.lower() in SUFFIXES
            if os.path.isdir(path):
                (folder_links if entry.is_symlink() else folders).append(path)
            elif is_image and entry.is_symlink() and (os.path.isfile(path) or not path.exists()):
                file_links.append(path)  # a dangling link is reported as a broken image
            elif is_image and os.path.isfile(path):  # not a pipe: reading one would block
                images[os.path.join(real, entry.name)] = path
            elif path.suffix.lower() not in _TEXT:
                content.others.append(path)
    # After all folders, because a link must not take the place of the file that it leads to.
    for path in file_links:
        if images.setdefault(os.path.realpath(path), path) is not path:
            content.repeats.append(path)
    content.images.extend(sorted(images.values()))
    return content


def _entries(folder: Path, setting: str) -> list[os.DirEntry[str]]:
    """The entries of a folder sorted by name, without hidden and system ones."""
    try:
        with os.scandir(folder) as entries:
            every = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"{setting}: cannot read {folder} ({error.strerror})") from error
    return [entry for entry in every if not _is_hidden(entry.name)]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or bool(_SYSTEM.fullmatch(name))
