"""Class names and their numbers, in a JSON file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ant_lightning.errors import FileError
from ant_lightning.files.json_file import read_json

__all__ = ["read_class_map", "write_class_map"]


def read_class_map(path: str | Path) -> list[str]:
    """Class names in the order of their numbers, from a JSON object of name to number.

    Names are those of folders, so a name that would lead out of the data's folder is refused.

    Raises:
        FileError: If the file is not such an object.
    """
    content = read_json(path, kind=dict, setting="data.class_map")
    if not content:
        raise FileError(f"data.class_map: {path} must hold an object of names and numbers")
    for name in content:
        if name in {"", ".", ".."} or "\0" in name or set(name) & {"/", "\\", os.sep}:
            raise FileError(
                f"data.class_map: a name must be that of a folder, found {name!r} in {path}"
            )
    numbers = list(content.values())
    if any(type(number) is not int for number in numbers) or sorted(numbers) != list(
        range(len(numbers))
    ):
        raise FileError(
            f"data.class_map: the numbers of {path} must be 0 .. {len(numbers) - 1}, each once, "
            f"found {numbers[:10]}"
        )
    return sorted(content, key=lambda name: content[name])


def write_class_map(path: str | Path, names: list[str]) -> None:
    """Write what `read_class_map` reads; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps({name: number for number, name in enumerate(names)}, indent=1))
    partial.replace(path)
