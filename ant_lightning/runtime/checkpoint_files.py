"""Checkpoint files: written as a whole or not at all, read only if they are intact."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from packaging.version import InvalidVersion, Version

from ant_lightning.errors import CheckpointWriteError, FileError
from ant_lightning.files.atomic import write_atomically
from ant_lightning.files.checkpoint_shards import check_shards, fill_shards, remove_orphans
from ant_lightning.files.torch_file import read_torch
from ant_lightning.runtime.run_files import no_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_NEEDED = {"pytorch-lightning_version": str, "state_dict": Mapping, "global_step": int}
_POSSIBLE = {
    "epoch": int,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "ant_lightning": Mapping,
    "shards": Mapping,
}
_WORDS = {str: "a text", int: "a whole number", Mapping: "a dictionary", list: "a list"}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name, flushes it to the disk, and only then renames it.

    `Checkpoints` installs it in place of Lightning's own, which does not flush and holds a second
    copy of the file in memory. Lightning's own still handles remote paths (`s3://...`).
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any = None,  # noqa: ANN401 - Lightning's own loose type
    ) -> None:
        """Write `checkpoint` to `path`; an existing file stays until the new one is complete.

        Raises:
            CheckpointWriteError: If the system refuses, for instance on a full disk.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_atomically(Path(path), lambda file: torch.save(checkpoint, file))
            _remove_orphans(Path(path).parent)  # those of the file that was replaced
        except (OSError, RuntimeError) as error:
            # PyTorch's writer reports a full disk as a RuntimeError about a file that is too short;
            # the OSError that caused it is further down the chain.
            refused: BaseException | None = error
            while refused is not None and not isinstance(refused, OSError):
                refused = refused.__cause__ or refused.__context__
            if refused is None:
                raise
            reason = refused.strerror or str(refused)
            raise CheckpointWriteError(f"{path}: could not be written: {reason}") from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint with its shards, the file that names them first."""
        super().remove_checkpoint(path)
        if "://" not in str(path):
            _remove_orphans(Path(path).parent)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, after checking that it is intact.

        Raises:
            FileError: If the file is damaged or not safe to read.
        """
        if "://" not in str(path) and Path(path).is_file():
            has_shards = "shards" in read_whole_checkpoint(Path(path), with_shards=False)
            if has_shards:
                return read_whole_checkpoint(Path(path))
        # Into memory, not mapped: training may replace or remove the file later.
        return super().load_checkpoint(path, *args, **{**kwargs, "weights_only": True})


def read_whole_checkpoint(path: Path, *, with_shards: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, after checking that all its parts match their checksums.

    Every byte is read once; no code of the file is run, and no tensor is copied, but for those that
    are put together from shards.

    Args:
        path: The file.
        with_shards: Whether to put tensors together; without, their shards are checked only.

    Raises:
        FileError: If it is missing or damaged, would run code, or is not a Lightning checkpoint.
    """
    content = read_checkpoint_file(path)
    if "shards" in content:
        check_shards(path, content["shards"])
        if with_shards:
            fill_shards(path, content)
    return content


def read_checkpoint_file(path: Path) -> dict[str, Any]:
    """As `read_whole_checkpoint`, without the shards that lie beside the file.

    Raises:
        FileError: As there.
    """
    content = read_torch(path)
    fault = content_fault(content)
    if fault is not None:
        raise FileError(f"{path}: {fault}")
    return content  # type: ignore[return-value] # `content_fault` refuses others


def content_fault(content: object) -> str | None:
    """Why this cannot be the content of a Lightning checkpoint; `None` if it can."""
    if not isinstance(content, Mapping):
        return f"must hold a dictionary, found {type(content).__name__}"
    for name, kind in {**_NEEDED, **_POSSIBLE}.items():
        if name not in content:
            if name in _NEEDED:
                return f"must hold {name} as Lightning writes it, found {sorted(map(str, content))}"
        elif not isinstance(content[name], kind):
            return f"must hold {_WORDS[kind]} as {name}, found {type(content[name]).__name__}"
    version = content["pytorch-lightning_version"]
    try:
        Version(version)
    except InvalidVersion:
        return f"must hold a version as pytorch-lightning_version, found {version!r}"
    return None


def furthest_whole(
    paths: Iterable[Path],
    *,
    accept: Callable[[Path, dict[str, Any]], bool] = lambda path, content: True,
    with_shards: bool = True,
) -> tuple[Path, dict[str, Any]] | None:
    """The intact checkpoint with the most steps, and its content; warns of damaged ones.

    Steps decide, not file times: copying a folder changes the times.

    Args:
        paths: The files.
        accept: Called with a file and its content before the checksums are compared; `False` skips
            the file without a warning.
        with_shards: As in `read_whole_checkpoint`.
    """
    found = [(path, _peek(path)) for path in paths]

    def steps(each: tuple[Path, dict[str, Any] | None]) -> tuple[int, Path]:
        path, content = each  # unreadable files first: they are always reported
        return sys.maxsize if content is None else content["global_step"], path

    for path, content in sorted(found, key=steps, reverse=True):
        if content is not None and not accept(path, content):
            continue
        try:
            return path, read_whole_checkpoint(path, with_shards=with_shards)
        except FileError as error:
            warnings.warn(f"ckpt_path: skipped {error}", stacklevel=2)
    return None


def checkpoint_of_run(folder: Path, *, with_shards: bool = True) -> tuple[Path, dict[str, Any]]:
    """The intact checkpoint of a run with the most steps, and its content.

    Args:
        folder: The folder of the run, or that of its checkpoints.
        with_shards: As in `read_whole_checkpoint`.

    Raises:
        ConfigError: If there is none.
    """
    place = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found = furthest_whole(place.glob("*.ckpt"), with_shards=with_shards)
    if found is None:
        raise no_run(folder, "no checkpoint in it", "the folder of a run with a checkpoint")
    return found


def _peek(path: Path) -> dict[str, Any] | None:
    """The content of a checkpoint without comparing checksums; `None` if it cannot be read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # reading a damaged file may raise anything
        return None
    return content if content_fault(content) is None else None


def remove_unfinished(folder: Path) -> None:
    """Remove half-written files and shards of processes that have ended."""
    for path in folder.glob(".*.ckpt.*.tmp"):
        pid = path.name.split(".")[-2]  # `write_atomically` names its files `.NAME.PID.tmp`
        # This process writes nothing now: a file with its number is from an earlier process.
        if pid.isdecimal() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            path.unlink(missing_ok=True)
    _remove_orphans(folder)


def _remove_orphans(folder: Path) -> None:
    """Remove the shards that no checkpoint names, unless another process may be writing them."""
    remove_orphans(folder, is_alive=_is_alive)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except OSError as error:
        # Any other refusal (no permission) means that it is alive.
        return not isinstance(error, ProcessLookupError)
    return True
