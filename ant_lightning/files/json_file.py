"""JSON files: the length is checked before reading; writing is atomic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from ant_lightning.errors import FileError
from ant_lightning.files.atomic import write_text

_MAX_BYTES = 2**24  # our class maps, indices and configs take kilobytes
Content = TypeVar("Content", dict[str, Any], list[Any])


def read_json(path: str | Path, *, kind: type[Content]) -> Content:
    """Read a JSON object (`kind=dict`) or array (`kind=list`) of at most 16 MiB.

    Raises:
        FileError: If the file is missing, longer, not JSON, or holds another kind of value.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        content = json.loads(path.read_text(encoding="utf8")) if size <= _MAX_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        # ValueError: bytes that are not UTF-8, text that is not JSON, integers of too many digits.
        reason = getattr(error, "strerror", None) or error  # str(error) would repeat the path
        raise FileError(f"{path}: must be a JSON file, found: {reason}") from error
    if size > _MAX_BYTES:
        raise FileError(f"{path}: must have at most {_MAX_BYTES} bytes, found {size}")
    if not isinstance(content, kind):
        wanted = {dict: "an object of names and values", list: "an array"}[kind]
        raise FileError(f"{path}: must hold {wanted}, found {type(content).__name__}")
    return content


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")
