"""Class maps: JSON files with the number of each class."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.json_file import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence


def read_class_map(path: str | Path) -> list[str]:
    """Read class names, in the order of their numbers, from a JSON object of name to number.

    A class is the name of a folder, so a name that would lead out of the data's folder is refused.

    Raises:
        FileError: If the file is not such an object.
    """
    content = read_json(path, kind=dict)
    for name in content:
        if name in {"", ".", ".."} or set(name) & set("/\\\0"):
            raise FileError(f"{path}: a class must have the name of a folder, found {name!r}")
    numbers = list(content.values())
    # Not isinstance: JSON's true is an int as well. `or 1` refuses an empty map.
    if any(type(number) is not int for number in numbers) or sorted(numbers) != list(
        range(len(numbers) or 1)
    ):
        raise FileError(
            f"{path}: the classes must be numbered 0 .. {len(numbers) - 1}, each once, "
            f"found {str(numbers)[:100]}"
        )
    return sorted(content, key=lambda name: content[name])


def class_numbers(
    classes: Sequence[int | str], names: Sequence[str], *, num_classes: int, most: int
) -> list[int]:
    """The numbers of classes that are given by number or by name.

    Args:
        classes: The classes.
        names: The name of each class, if they are known.
        num_classes: How many classes there are.
        most: The largest number; above the classes' it stands for none of them.

    Raises:
        ConfigError: If there is no such class; says which there are.
    """
    known = {name: number for number, name in enumerate(names)}
    for each in classes:
        if each in known if isinstance(each, str) else 0 <= each <= most:
            continue
        shown = ", ".join(f"{number} {name}" for name, number in list(known.items())[:20])
        rule = (
            f"{shown}{', ...' if names[20:] else ''}" if names else f"from 0 to {num_classes - 1}"
        )
        null = f", or {most} for no class" if most >= num_classes else ""
        raise ConfigError(f"samples.classes: must be {rule}{null}, found {each}")
    return [known[each] if isinstance(each, str) else each for each in classes]


def write_class_map(path: str | Path, names: list[str]) -> None:
    """Write a class map: class `names[i]` has number i."""
    write_json(Path(path), {name: number for number, name in enumerate(names)})


def number_classes(found: list[str], path: str | None) -> list[str]:
    """Number the classes; returns their names in the order of their numbers.

    Args:
        found: The class of each image; empty if the data has no classes.
        path: The class map that decides the numbers. If the file does not exist, the names are
            numbered in sorted order and written to it. `None`: sorted order, nothing is written.

    Raises:
        ConfigError: If the class map lacks a class.
    """
    names = sorted(set(found))
    if path is None or not names:
        return names
    if not Path(path).exists():
        write_class_map(path, names)
        return names
    known = read_class_map(path)
    missing = sorted(set(names) - set(known))
    if missing:
        raise ConfigError(
            f"class_map: must have every class, found no class {missing[0]!r} in {path}"
        )
    return known


def record_classes(path: Path, names: list[str]) -> None:
    """Write a class map, unless `path` holds something else already: then warn."""
    try:
        known = read_class_map(path) if path.exists() else None
    except FileError:
        known = []  # no class map: differs from `names`, so it is kept and the warning is given
    if known is None:
        write_class_map(path, names)
    elif known != names:
        warnings.warn(
            f"{path}: has other classes and is not overwritten; this run's classes are in its "
            "checkpoints",
            stacklevel=2,
        )
