"""JSON files: their length is checked before they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from ant_lightning.errors import FileError

__all__ = ["read_json"]

_MAX_BYTES = 2**24  # class maps, indices and configs have kilobytes
Content = TypeVar("Content", dict[str, Any], list[Any])


def read_json(path: str | Path, *, kind: type[Content], setting: str) -> Content:
    """Read a JSON object (`kind=dict`) or array (`kind=list`) of at most 16 MiB.

    Raises:
        FileError: If the file is missing, longer, no JSON, or holds another kind of value.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise FileError(f"{setting}: {path} must have at most {_MAX_BYTES} bytes, found {size}")
        content = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError) as error:
        # ValueError covers bytes that are no text, text that is no JSON, and endless numbers.
        if isinstance(error, FileError):
            raise
        raise FileError(f"{setting}: cannot read {path} ({error})") from error
    if not isinstance(content, kind):
        wanted = {dict: "an object of names and values", list: "an array"}[kind]
        raise FileError(f"{setting}: {path} must hold {wanted}, found {type(content).__name__}")
    return content
