"""Reads what a checkpoint holds besides the values of its tensors, without importing PyTorch."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class TensorOutline(NamedTuple):
    """Stands for a tensor."""

    shape: tuple[int, ...]


class _Unknown:
    """Stands for any other object; whatever the file does to it is without effect."""

    def __new__(cls, *args: object, **kwargs: object) -> _Unknown:
        return super().__new__(cls)

    def __call__(self, *args: object) -> _Unknown:
        return self

    def __setstate__(self, state: object) -> None: ...


def _tensor(storage: object, offset: object, size: tuple[int, ...], *rest: object) -> TensorOutline:
    """In place of `torch._utils._rebuild_tensor_v2`."""
    return TensorOutline(tuple(size))


def _parameter(data: TensorOutline, *rest: object) -> TensorOutline:
    """In place of `torch._utils._rebuild_parameter`."""
    return data


_KNOWN: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


# The unpickler written in Python: that in C reserves and fills memory for any number that a file
# names, this one keeps a dictionary.
class _Outline(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        return _KNOWN.get((module, name), _Unknown)

    def persistent_load(self, pid: object) -> None:  # the values of a tensor
        return None


def read_outline(path: Path) -> Any | None:  # noqa: ANN401 - what was saved
    """What `torch.save` wrote, with a `TensorOutline` for each tensor; `None` if it cannot tell.

    Only the record of names and shapes is read, a small part of the file. No code in the file
    runs: every class or function that it names is replaced. Unlike `read_torch` it explains no
    damage and reads no file from before torch 1.6.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            record = next(r for r in archive.infolist() if r.filename.endswith("/data.pkl"))
            if record.compress_type != zipfile.ZIP_STORED:  # torch compresses nothing
                return None
            return _Outline(io.BytesIO(archive.read(record))).load()
    except Exception:  # arbitrary bytes make the unpickler raise any type of error
        return None
