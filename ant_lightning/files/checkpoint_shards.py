"""The sharded tensors of a checkpoint, in a folder of `torch.distributed.checkpoint` beside it.

The checkpoint's own file holds everything else, and under `shards` the name of the folder, the size
and checksum of each of its files, and the place of each tensor. The folder has a new name in every
save, and the file, which names it, is renamed into place last. So a checkpoint is the old one or
the new one at any time, never a half one.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
import zlib
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ant_lightning.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Place = tuple[Any, ...]  # keys from the checkpoint down to a tensor

KEY = "shards"
_MARK = ".shards."
# What the index of a folder may be made of: reading it then cannot run code.
_INDEX = {
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", "float64", "float32", "float16", "bfloat16", "strided"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),  # from Python 3.13 on
}


def separated(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Place, Tensor]]:
    """A copy of a checkpoint with None for each sharded tensor, and these tensors by place."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - a second

    tensors: dict[Place, Tensor] = {}

    def copied(value: Any, place: Place) -> Any:  # noqa: ANN401 - whatever a checkpoint holds
        if isinstance(value, DTensor):
            tensors[place] = value.detach()
            return None
        if isinstance(value, dict):
            return {key: copied(each, (*place, key)) for key, each in value.items()}
        if isinstance(value, list):
            return [copied(each, (*place, i)) for i, each in enumerate(value)]
        return value

    return copied(dict(checkpoint), ()), tensors


def put(checkpoint: Any, place: Place, value: object) -> None:  # noqa: ANN401
    """Put a tensor back into its place."""
    for key in place[:-1]:
        checkpoint = checkpoint[key]
    checkpoint[place[-1]] = value


def new_shards_folder(path: Path) -> Path:
    """A new name of a folder for the shards of a checkpoint."""
    # With the process, so that another one does not take it for an orphan while it is written.
    return path.with_name(f"{path.name}{_MARK}{os.getpid()}.{token_hex(4)}")


def write_shards(folder: Path, tensors: Mapping[Place, Tensor], *, rank: int) -> dict[str, Any]:
    """Write this rank's parts; return size and checksum of its files. Collective.

    Replicas share the work: each part is written once.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter  # noqa: PLC0415 - a second
    from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415

    save(
        {_name(place): tensor for place, tensor in tensors.items()},
        storage_writer=FileSystemWriter(folder, sync_files=True),
    )
    own = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
    return {path.name: [path.stat().st_size, _checksum(path)] for path in own}


def check_shards(path: Path, entry: Any, *, share: tuple[int, int] = (0, 1)) -> None:  # noqa: ANN401
    """Compare the files of a folder with their sizes and checksums.

    Args:
        path: The checkpoint's file.
        entry: Its entry `shards`.
        share: `(r, n)`: check the r-th of n shares.

    Raises:
        FileError: If a file is missing or damaged.
    """
    folder, files = _entry(path, entry)
    for name, (size, checksum) in sorted(files.items())[share[0] :: share[1]]:
        file = folder / name
        if not file.is_file():
            raise FileError(f"{path}: needs the folder {folder.name} beside it, found no {file}")
        if file.stat().st_size != size or _checksum(file) != checksum:
            raise FileError(f"{file}: damaged, its size or checksum does not agree with {path}")


def fill_shards(
    path: Path,
    content: dict[str, Any],
    like: Callable[[Place, torch.Size, torch.dtype], Tensor | None] | None = None,
) -> None:
    """Put the tensors of the folder into the content of the checkpoint's file.

    Args:
        path: The checkpoint's file, whose folder was checked.
        content: Its content; loses its entry `shards`.
        like: An empty tensor for a place, shape and dtype; a sharded one receives this rank's part,
            and the call is collective. None leaves the place empty. By default all are whole.

    Raises:
        FileError: If the folder does not hold what the file says.
    """
    from torch.distributed.checkpoint.state_dict_loader import load  # noqa: PLC0415

    folder, files = _entry(path, content[KEY])
    collective = like is not None
    try:
        index = _read_index(folder, files)
        empty: dict[Place, Tensor] = {}
        for place in map(tuple, content[KEY]["tensors"]):
            stored = index.state_dict_metadata[_name(place)]
            shape, dtype = stored.size, stored.properties.dtype
            target = torch.empty(shape, dtype=dtype) if like is None else like(place, shape, dtype)
            if target is not None:
                empty[place] = target
        with warnings.catch_warnings():
            # That each process reads alone is what is wanted.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(
                {_name(place): tensor for place, tensor in empty.items()},
                storage_reader=_reader(folder, files),
                no_dist=not collective,
            )
    except FileError:
        raise
    except Exception as error:  # damaged files make torch raise any type of error
        raise FileError(f"{folder}: damaged, or not written with {path} ({error})") from error
    for place, tensor in empty.items():
        put(content, place, tensor)
    del content[KEY]  # nothing is left to fill


def remove_orphans(folder: Path, *, is_alive: Callable[[int], bool]) -> None:
    """Remove the shards that no checkpoint in this folder names.

    Args:
        folder: A folder of checkpoints.
        is_alive: Whether another process with this number runs: it may be writing shards.
    """
    orphans = {each.name: each for each in folder.glob(f"*{_MARK}*") if each.is_dir()}
    for path in folder.glob("*.ckpt") if orphans else ():
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if KEY in content:
                orphans.pop(content[KEY]["folder"], None)
        except Exception:  # a damaged file may raise anything; it may name any folder
            return
    for name, orphan in orphans.items():
        pid = name.rpartition(_MARK)[2].partition(".")[0]
        if pid.isdecimal() and (int(pid) == os.getpid() or not is_alive(int(pid))):
            shutil.rmtree(orphan, ignore_errors=True)


def _name(place: Place) -> str:
    return ".".join(map(str, place))


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _entry(path: Path, entry: Any) -> tuple[Path, dict[str, tuple[int, int]]]:  # noqa: ANN401
    """The folder, and the sizes and checksums of its files.

    Raises:
        FileError: If the entry is not one that `write_shards` makes, or leads out of the folder.
    """
    try:
        names = [entry["folder"], *entry["files"]]
        files = {str(name): (int(a), int(b)) for name, (a, b) in entry["files"].items()}
        plain = all(isinstance(name, str) and Path(name).name == name for name in names)
        ok = plain and ".metadata" in files and isinstance(entry["tensors"], list)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        ok = False
    if not ok:
        raise FileError(f"{path}: must name the files of its shards, found {str(entry)[:100]}")
    # A link such as last.ckpt -> step_800.ckpt may lie in another folder.
    return path.resolve().parent / entry["folder"], files


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        if name not in _INDEX.get(module, ()):
            raise FileError(f"refused, because reading it would call {module}.{name}")
        return super().find_class(module, name)


def _read_index(folder: Path, files: Mapping[str, tuple[int, int]]) -> Any:  # noqa: ANN401
    """The index of a folder, after checking what it points to.

    Raises:
        FileError: If it would run code, or names other files or tensors larger than all files.
    """
    path = folder / ".metadata"
    with path.open("rb") as file:
        try:
            index = _IndexReader(file).load()
        except FileError as error:
            raise FileError(f"{path}: {error}") from error
    total = sum(size for size, _ in files.values())
    for stored in index.state_dict_metadata.values():
        if stored.size.numel() * stored.properties.dtype.itemsize > total:
            raise FileError(f"{path}: refused, a tensor says the shape {list(stored.size)}")
    for info in index.storage_data.values():
        if info.relative_path not in files or info.transform_descriptors:
            raise FileError(f"{path}: refused, it points to {info.relative_path}")
    return index


def _reader(folder: Path, files: Mapping[str, tuple[int, int]]) -> Any:  # noqa: ANN401
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # noqa: PLC0415

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            return _read_index(folder, files)

    return Reader(folder)
