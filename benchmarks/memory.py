"""Peak memory of a piece of work: measured in a separate process, or counted over its tensors."""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["LiveBytes", "added_memory"]


class LiveBytes:
    """Bytes of tensor storages, each from when it is added until it is freed.

    Attributes:
        now: Bytes that are alive.
        peak: Largest number of bytes that were alive at one time.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Count the storage of `tensor`, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def added_memory(
    prepare: Callable[..., object], work: Callable[..., object], *arguments: object
) -> float:
    """MiB that `work(*arguments)` adds to a fresh process that ran `prepare(*arguments)`.

    The maximum resident memory during the work, minus the resident memory before; on a GPU, the
    peak of its tensors. Both functions must be importable by name. `prepare` is for imports and for
    the workspace of kernels that is allocated once.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as fresh:
        return fresh.submit(_measure, torch.get_num_threads(), prepare, work, arguments).result()


def _measure(
    threads: int,
    prepare: Callable[..., object],
    work: Callable[..., object],
    arguments: tuple[object, ...],
) -> float:
    torch.set_num_threads(threads)
    prepare(*arguments)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work(*arguments)
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the maximum
    work(*arguments)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """KiB of this process, from the kernel."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])
