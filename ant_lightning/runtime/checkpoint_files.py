"""Checkpoint files are whole or absent, and are read only if they are whole."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ant_lightning.errors import CheckpointWriteError, FileError
from ant_lightning.files.atomic import write_atomically
from ant_lightning.models.checkpoint_content import content_fault, read_whole_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["AtomicCheckpointIO", "furthest_whole", "read_whole_checkpoint", "remove_unfinished"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it, and only then gives it its name.

    `Checkpoints` puts it in the place of Lightning's own, which does not flush and holds the file
    in memory a second time. Paths that are not local (`s3://...`) are left to Lightning.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any = None,  # noqa: ANN401 - Lightning's own loose type
    ) -> None:
        """Write `checkpoint` to `path`; a file that was there stays until the new one is whole.

        Raises:
            CheckpointWriteError: If the system refuses, for instance on a full disk.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_atomically(Path(path), lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:
            refused = _system_error(error)
            if refused is None:
                raise
            reason = refused.strerror or str(refused)
            raise CheckpointWriteError(f"{path}: could not be written: {reason}") from error

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint that is whole.

        Raises:
            FileError: If the file is damaged or not safe to read.
        """
        if "://" not in str(path) and Path(path).is_file():
            read_whole_checkpoint(Path(path))
        # Read into memory: what is mapped would be lost with the file while training goes on.
        return super().load_checkpoint(path, *args, **{**kwargs, "weights_only": True})


def furthest_whole(
    paths: Iterable[Path],
    *,
    accept: Callable[[Path, dict[str, Any]], bool] = lambda path, content: True,
) -> tuple[Path, dict[str, Any]] | None:
    """The intact checkpoint with the most steps, and its content; warns of damaged ones.

    Steps decide, not file times: copying a folder changes the times.

    Args:
        paths: The files.
        accept: Called with a file and its content, before all of its bytes are checked; False for
            a file that is not meant.
    """
    found = [(path, _peek(path)) for path in paths]
    # What cannot be read comes first, so that it is reported.
    steps = {
        path: sys.maxsize if content is None else content["global_step"] for path, content in found
    }
    for path, content in sorted(found, key=lambda each: (steps[each[0]], each[0]), reverse=True):
        if content is not None and not accept(path, content):
            continue
        try:
            return path, read_whole_checkpoint(path)
        except FileError as error:
            fault = str(error).removeprefix("ckpt_path: ")
            warnings.warn(f"ckpt_path: skipped {fault}", stacklevel=2)
    return None


def _peek(path: Path) -> dict[str, Any] | None:
    """What a checkpoint holds, without comparing its bytes with their checksums."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # reading a damaged file may raise anything
        return None
    return content if content_fault(content) is None else None


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that are no more have left half written."""
    for path in folder.glob(".*.ckpt.*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not _alive(int(pid))):
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's process
        return True
    return True


def _system_error(error: BaseException) -> OSError | None:
    """The refusal behind an error: PyTorch's writer reports that its file came out too short."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen
