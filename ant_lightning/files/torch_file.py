"""Reads files of `torch.save` without running code that they may contain."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ant_lightning.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# A command for users to run on a file that they trust: unlike this module, it unpickles anything.
_RESAVE = """python -c "import torch; \
c = torch.load('FILE', map_location='cpu', weights_only=False); \
torch.save({k: c[k] for k in ('state_dict', 'model', 'ema') if k in c} or c, 'weights.pt')\""""


def read_torch(path: str | Path, *, allowed: Sequence[Any] = ()) -> object:
    """Read what `torch.save` wrote, onto the CPU; files in the zip format are mapped, not copied.

    Always with `weights_only=True`: only tensors, containers and plain values are read, and no code
    in the file can run. In the zip format, records must be stored uncompressed, as torch writes
    them, so that none is larger than the file; their checksums are compared. In the format before
    torch 1.6, torch reserves the sizes that the file claims before it reads, but touches no page.

    Args:
        path: The file.
        allowed: Further classes that the file may name, or pairs of a class and the name that it
            replaces.

    Raises:
        FileError: If the file is missing, damaged, needs pickled classes or functions, or has a
            tensor that is larger than the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    size = path.stat().st_size
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_records(path, size)
        with torch.serialization.safe_globals(list(allowed)):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        _check_tensors(content, path, size)
    except FileError:
        raise
    except Exception as error:
        # Arbitrary bytes make zipfile and torch raise any type of error; no code of the file ran.
        called = re.search(r"GLOBAL (\S+)", str(error))
        if called and isinstance(error, pickle.UnpicklingError):
            raise FileError(
                f"{path}: refused, because reading it would call {called.group(1)}; a file with "
                "such pickles can run any code. Where you trust the file, keep its weights alone "
                f"with: {_RESAVE.replace('FILE', path.name)} or save them as safetensors"
            ) from error
        raise FileError(
            f"{path}: truncated, damaged, or not written by torch.save ({size} bytes)"
        ) from error
    return content


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that contain a NaN or an infinity, in order."""
    return [name for name, value in tensors.items() if not bool(value.isfinite().all())]


def _check_records(path: Path, size: int) -> None:
    """Refuse compressed records, and compare checksums, which torch does not."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        packed = [r.filename for r in records if r.compress_size != r.file_size or r.compress_type]
        if packed or sum(record.file_size for record in records) > size:
            raise FileError(
                f"{path}: refused, its record {(packed or ['list'])[0]} unpacks to more than the "
                "file; torch.save packs none"
            )
        # If all checksums are 0, the writer left them out, which is an option of torch.save.
        broken = archive.testzip() if any(record.CRC for record in records) else None
    if broken is not None:
        raise FileError(f"{path}: damaged, the checksum of its record {broken} does not agree")


def _check_tensors(content: object, path: Path, size: int) -> None:
    """Refuse a tensor larger than the file, such as one number expanded to 2^60 values."""
    for tensor in _tensors(content):
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise FileError(f"{path}: refused, it has a tensor without values")
        if tensor.numel() * tensor.element_size() > size:
            raise FileError(
                f"{path}: refused, a tensor says the shape {list(tensor.shape)} in a file of "
                f"{size} bytes"
            )


def _tensors(content: object) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    # `seen`, because a pickle can hold a container that contains itself.
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)
