"""Where gradient rows are kept until their dot products are made: in memory, or in a folder."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ant_lightning.errors import ConfigError
from ant_lightning.files.atomic import write_atomically
from ant_lightning.files.npy import map_npy

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

__all__ = ["FolderRows", "MemoryRows", "RowStore"]


class RowStore(ABC):
    """Pairs of rows `[2, width]`, one for each timestep: the gradients of the two halves.

    Args:
        width: Numbers in a row: `p`, or the dimensions of the sketch.
        dtype: What they are kept as: float32, or bfloat16 for sketches, so that both halves of
            `n` timesteps take the bytes of `n x width` floats. Rounding to bfloat16 adds about
            0.1% to the standard error of a sketch.
    """

    def __init__(self, width: int, *, dtype: torch.dtype = torch.float32) -> None:
        self.width = width
        self.dtype = dtype

    @abstractmethod
    def put(self, timestep: int, pair: Tensor) -> None:
        """Keep the pair of a timestep; once this returns, a kill loses it no more (in a folder)."""

    @abstractmethod
    def finished(self, timesteps: Collection[int]) -> list[int]:
        """Those of `timesteps` whose pair is kept, in their order."""

    @abstractmethod
    def columns(self, timesteps: Sequence[int], start: int, stop: int) -> Tensor:
        """Columns `[start, stop)` of the pairs of some timesteps, `[n, 2, stop - start]`."""


class MemoryRows(RowStore):
    """Rows in the memory of the CPU."""

    def __init__(self, width: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(width, dtype=dtype)
        self._pairs: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(pair.nbytes for pair in self._pairs.values())

    def put(self, timestep: int, pair: Tensor) -> None:
        """Keep the pair."""
        self._pairs[timestep] = pair.to("cpu", self.dtype)

    def finished(self, timesteps: Collection[int]) -> list[int]:
        """Those of `timesteps` whose pair is kept."""
        return [each for each in timesteps if each in self._pairs]

    def columns(self, timesteps: Sequence[int], start: int, stop: int) -> Tensor:
        """Columns `[start, stop)` of the pairs."""
        if not timesteps:
            return torch.empty(0, 2, stop - start, dtype=self.dtype)
        return torch.stack([self._pairs[each][:, start:stop] for each in timesteps])


class FolderRows(RowStore):
    """Rows on disk, one `.npy` file for each timestep, each written whole or not at all.

    Args:
        folder: Where; made if missing.
        width: Numbers in a row.
        dtype: float32 or bfloat16 (in the files as int16: numpy has no bfloat16).
    """

    def __init__(self, folder: Path, *, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(width, dtype=dtype)
        self._folder = folder
        self._file_dtype = np.dtype(np.int16 if dtype == torch.bfloat16 else np.float32)
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, timestep: int, pair: Tensor) -> None:
        """Write the pair's file."""
        kept = pair.to("cpu", self.dtype)
        array = (kept.view(torch.int16) if self.dtype == torch.bfloat16 else kept).numpy()
        write_atomically(self._file(timestep), lambda file: np.save(file, array))

    def finished(self, timesteps: Collection[int]) -> list[int]:
        """Those of `timesteps` whose file is there."""
        return [each for each in timesteps if self._file(each).exists()]

    def columns(self, timesteps: Sequence[int], start: int, stop: int) -> Tensor:
        """Read columns `[start, stop)`, and nothing else, of the files."""
        block = np.empty((len(timesteps), 2, stop - start), dtype=self._file_dtype)
        for row, timestep in enumerate(timesteps):
            block[row] = self._open(timestep)[:, start:stop]
        return torch.from_numpy(block).view(self.dtype)

    def require_space(self, num_timesteps: int) -> None:
        """Check that the disk holds the rows of that many more timesteps.

        Raises:
            ConfigError: If it does not.
        """
        needed = num_timesteps * 2 * self.width * self.dtype.itemsize
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise ConfigError(
                f"state_path: the rows need {needed / 2**30:.1f} GiB on disk, found "
                f"{free / 2**30:.1f} GiB free in {self._folder}; set sketch_dim, or fewer timesteps"
            )

    def _file(self, timestep: int) -> Path:
        return self._folder / f"rows_{timestep:06d}.npy"

    def _open(self, timestep: int) -> np.ndarray:
        return map_npy(
            self._file(timestep),
            shape=(2, self.width),
            dtype=self._file_dtype,
            setting="state_path",
            hint="delete it to compute that timestep again",
        )
