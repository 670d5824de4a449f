"""Tensors in safetensors files, which are mapped into memory and contain no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant_lightning.errors import FileError
from ant_lightning.files.atomic import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

# The key of our metadata. They are a single entry: safetensors writes several in a random order.
_KEY = "ant_lightning"


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors and JSON metadata to a safetensors file, atomically."""
    from safetensors.torch import save  # noqa: PLC0415 - other formats do without

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Not safetensors' own writer, which neither flushes nor gives the file the usual permissions.
    content = save(on_cpu, metadata={_KEY: json.dumps(metadata)})
    write_atomically(Path(path), lambda file: file.write(content))


def read_tensors(
    path: str | Path,
    expected: Mapping[str, tuple[torch.dtype, tuple[int | str, ...]]],
    metadata: Mapping[str, object] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `write_tensors` wrote: its tensors, mapped into memory, and its metadata.

    Args:
        path: The file.
        expected: Dtype and shape of each tensor by name. A string in a shape stands for a length
            that is not known, but equal wherever that string occurs. Other tensors are ignored.
        metadata: For each required entry, the type or the value that it must have.

    Raises:
        FileError: If the file is missing or damaged, or a tensor or an entry is not as expected.
    """
    tensors, texts = read_safetensors(path)
    lengths: dict[int | str, int] = {}
    for name, (dtype, shape) in expected.items():
        found = tensors.get(name)
        if found is None or not _is_like(found, dtype, shape, lengths):
            wanted = ", ".join(str(lengths.get(side, side)) for side in shape)
            what = "nothing" if found is None else f"{found.dtype} of shape {list(found.shape)}"
            raise FileError(
                f"{path}: must hold {name} as {dtype} of shape [{wanted}], found {what}"
            )
    try:
        entries = dict(json.loads(texts.get(_KEY, "{}")))
    except (TypeError, ValueError, RecursionError) as error:
        raise FileError(f"{path}: its metadata must be a JSON object, found {error}") from error
    for name, rule in (metadata or {}).items():
        entry = entries.get(name)
        if not (type(entry) is rule if isinstance(rule, type) else entry == rule):
            wanted = f"of type {rule.__name__}" if isinstance(rule, type) else repr(rule)
            raise FileError(f"{path}: its metadata {name} must be {wanted}, found {entry!r:.100}")
    return {name: tensors[name] for name in expected}, entries


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read any safetensors file: tensors by name, mapped into memory, and its metadata.

    The library itself compares the header with the length of the file before it makes a tensor.

    Raises:
        FileError: If the file is missing, truncated, or not a safetensors file.
    """
    from safetensors import safe_open  # noqa: PLC0415 - other formats do without

    if not Path(path).is_file():
        raise FileError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except Exception as error:  # a damaged header makes it fail in several ways
        raise FileError(f"{path}: truncated or not a safetensors file ({error})") from error


def _is_like(
    tensor: Tensor,
    dtype: torch.dtype,
    shape: tuple[int | str, ...],
    lengths: dict[int | str, int],
) -> bool:
    """Whether a tensor has the dtype and shape; records the length of each new string."""
    return (tensor.dtype, tensor.dim()) == (dtype, len(shape)) and all(
        length == (side if isinstance(side, int) else lengths.setdefault(side, length))
        for side, length in zip(shape, tensor.shape, strict=True)
    )
