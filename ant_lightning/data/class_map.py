"""Class names and their numbers, in a JSON file."""

from __future__ import annotations

from pathlib import Path

from ant_lightning.errors import FileError
from ant_lightning.files.json_file import read_json, write_json

__all__ = ["read_class_map", "write_class_map"]


def read_class_map(path: str | Path) -> list[str]:
    """Class names in the order of their numbers, from a JSON object of name to number.

    Names are those of folders, so a name that would lead out of the data's folder is refused.

    Raises:
        FileError: If the file is not such an object.
    """
    content = read_json(path, kind=dict)
    for name in content:
        if name in {"", ".", ".."} or set(name) & set("/\\\0"):
            raise FileError(f"{path}: a class must have the name of a folder, found {name!r}")
    numbers = list(content.values())
    if any(type(number) is not int for number in numbers) or sorted(numbers) != list(
        range(len(numbers) or 1)
    ):
        raise FileError(
            f"{path}: the classes must be numbered 0 .. {len(numbers) - 1}, each once, "
            f"found {str(numbers)[:100]}"
        )
    return sorted(content, key=lambda name: content[name])


def write_class_map(path: str | Path, names: list[str]) -> None:
    """Write what `read_class_map` reads."""
    write_json(Path(path), {name: number for number, name in enumerate(names)})
