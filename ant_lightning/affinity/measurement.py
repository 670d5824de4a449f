"""The long part of measuring affinity: the gradients of each timestep, kept as they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.affinity.halves import NonFiniteGradientError
from ant_lightning.affinity.rows import FolderRows, MemoryRows
from ant_lightning.affinity.sketch import HadamardSketch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from ant_lightning.affinity.halves import HalfGradients
    from ant_lightning.affinity.rows import RowStore

__all__ = ["Measurement"]


class Measurement:
    """Makes gradient rows, whole or sketched, and keeps them.

    Args:
        gradients: Of the loss.
        sketch_dim: `m`, or None to keep rows whole.
        seed: Of the sketch.
    """

    def __init__(self, gradients: HalfGradients, *, sketch_dim: int | None, seed: int) -> None:
        self._gradients = gradients
        self._sketch: HadamardSketch | None = None
        self._width = gradients.num_parameters
        self._dtype = torch.float32
        if sketch_dim is not None:
            self._width, self._dtype = sketch_dim, torch.bfloat16
            self._sketch = HadamardSketch(
                gradients.num_parameters,
                sketch_dim=sketch_dim,
                seed=seed,
                device=gradients.device,
            )

    def rows(self, folder: Path | None, timesteps: Sequence[int]) -> RowStore:
        """Where rows are kept: a folder that has space for those not in it yet, or memory."""
        if folder is None:
            return MemoryRows(self._width, dtype=self._dtype)
        store = FolderRows(folder, width=self._width, dtype=self._dtype)
        store.require_space(len(timesteps) - len(store.finished(timesteps)))
        return store

    def fill(
        self,
        rows: RowStore,
        timesteps: Sequence[int],
        on_progress: Callable[[int, int], None] | None,
    ) -> NonFiniteGradientError | None:
        """Make and keep what is missing; stop at the first gradient that is not finite.

        Returns:
            The error of that gradient, which the caller raises once other ranks know of it.
        """
        finished = set(rows.finished(timesteps))
        done = len(finished)
        if on_progress is not None:
            on_progress(done, len(timesteps))
        for timestep in timesteps:
            if timestep in finished:
                continue
            pair = torch.empty(2, self._width, device=self._gradients.device)
            try:
                for half in (0, 1):
                    pair[half] = self._row(timestep, half)
            except NonFiniteGradientError as error:
                return error
            rows.put(timestep, pair)
            done += 1
            if on_progress is not None:
                on_progress(done, len(timesteps))
        return None

    def _row(self, timestep: int, half: int) -> Tensor:
        row = self._gradients(timestep, half)
        return row if self._sketch is None else self._sketch(row)
