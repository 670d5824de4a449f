"""Tensors in safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ant_lightning.errors import FileError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_safetensors"]


def read_safetensors(
    path: str | Path, *, setting: str = "checkpoint"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, mapped into memory, and the text in its header.

    The format runs nothing, and its reader compares the header with the length of the file before
    any tensor is made.

    Raises:
        FileError: If the file is missing, truncated, or none of safetensors.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - other formats do without

    path = Path(path)
    if not path.is_file():
        raise FileError(f"{setting}: must be an existing file, got {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise FileError(
            f"{setting} {path}: truncated or not a safetensors file ({error})"
        ) from error
