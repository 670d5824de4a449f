"""Searches a folder for images: finds each real image once and reports what was skipped."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ant_lightning.data.pictures import SUFFIXES
from ant_lightning.errors import ConfigError

__all__ = ["FolderContent", "search_images"]

# Names, in lower case, that file servers and operating systems create beside the user's.
_SYSTEM = frozenset(
    {
        "__macosx",
        "@eadir",
        "@recently-snapshot",
        "@recycle",
        "@tmp",
        "@__thumb",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "lost+found",
        "system volume information",
        "desktop.ini",
        "ehthumbs.db",
        "icon\r",
        "thumbs.db",
    }
)
# Captions, lists and licences: nobody expects these to be read as images.
_TEXT = frozenset(
    {".csv", ".html", ".json", ".jsonl", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml"}
)


@dataclass(frozen=True)
class FolderContent:
    """What lies below a folder.

    Attributes:
        images: Sorted. A file that links also lead to appears once, under its own path if that is
            below the folder.
        others: Files in formats that are not read, except text files.
        repeats: Links to files and folders already found, or to a parent folder.
        folders: Names of the folders directly below, without system folders and repeats.
    """

    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    repeats: list[Path] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    def passed_over(self, below: Path | None = None) -> str:
        """How many files and links were skipped, with an example; empty if none were."""
        others, repeats = (
            [path for path in paths if below is None or path.is_relative_to(below)]
            for paths in (self.others, self.repeats)
        )
        parts = []
        if others:
            kinds = Counter(path.suffix.lower() or "no ending" for path in others).most_common(5)
            listed = ", ".join(f"{kind} {count}" for kind, count in kinds)
            parts.append(
                f"files in formats that are not read: {len(others)} ({listed}), such as {others[0]}"
            )
        if repeats:
            parts.append(f"links to what was found already: {len(repeats)}, such as {repeats[0]}")
        return "; ".join(parts)


def search_images(root: Path, *, setting: str) -> FolderContent:
    """Find the images below `root`.

    Links to files and folders elsewhere are followed. Hidden (`.name`) and system entries
    (`@eaDir`, `__MACOSX`, ...) are skipped without being reported.

    Raises:
        ConfigError: If a folder cannot be read.
    """
    content = FolderContent()
    top = os.path.realpath(root)
    images: dict[str, Path] = {}  # keyed by real path
    seen: set[str] = set()
    # Links come last, so that files in the tree keep their own path and class.
    folders = [root]
    folder_links: list[Path] = []
    file_links: list[Path] = []
    while folders or folder_links:
        is_link = not folders
        folder = folder_links.pop(0) if is_link else folders.pop()
        real = os.path.realpath(folder)
        above = (top, os.path.realpath(folder.parent)) if is_link else ()
        if real in seen or any(Path(each).is_relative_to(real) for each in above):
            content.repeats.append(folder)
            continue
        seen.add(real)
        if folder is not root and folder.parent == root:
            content.folders.append(folder.name)
        for entry in _entries(folder, setting):
            path = folder / entry.name
            is_image = path.suffix.lower() in SUFFIXES
            if entry.is_symlink():
                if os.path.isdir(path):
                    folder_links.append(path)
                    continue
                # A dangling link is kept, to be reported as a broken image.
                if is_image and (os.path.isfile(path) or not os.path.exists(path)):
                    file_links.append(path)
                    continue
            elif entry.is_dir():
                folders.append(path)
                continue
            elif is_image and entry.is_file():  # not a pipe: reading one would block
                images[os.path.join(real, entry.name)] = path
                continue
            if path.suffix.lower() not in _TEXT:
                content.others.append(path)
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
    return [e for e in every if not e.name.startswith(".") and e.name.lower() not in _SYSTEM]
