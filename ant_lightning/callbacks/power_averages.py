"""The power-function averages that a run tracks, with their snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn

from ant_lightning.balancing.local_parts import full_tensor, local_part
from ant_lightning.callbacks.ema_snapshots import (
    average_from,
    kept_interval,
    link_snapshots,
    write_snapshot,
)
from ant_lightning.callbacks.power_function import power_decay
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import lightning as L
    from torch import Tensor


class PowerAverages:
    """Averages `m <- d m + (1 - d) w`, `d = (1 - 1 / n)^(g + 1)`, for several exponents `g`.

    Attributes:
        tracked: The averages by length, each by the names of the weights.
        snapshots: Digests of this run's snapshots by their number of updates.
        folder: Where these are; `None` if the run keeps none.
    """

    def __init__(self) -> None:
        self.tracked: dict[float, dict[str, Tensor]] = {}
        self.snapshots: dict[int, str] = {}
        self.folder: Path | None = None
        # The last combination of snapshots, by number of updates and length.
        self._combined: tuple[tuple[int, float], dict[str, Tensor]] | None = None

    def begin(self, lengths: Iterable[float], *, num_updates: int) -> None:
        """Track these lengths from now on.

        Raises:
            ConfigError: If one has missed earlier updates.
        """
        lengths = list(lengths)
        if num_updates and not set(lengths) <= self.tracked.keys():
            raise ConfigError(
                f"lengths: must be among those of the checkpoint {sorted(self.tracked)}, found "
                f"{lengths}"
            )
        self.tracked = {length: self.tracked.get(length, {}) for length in lengths}

    def update(self, weights: Mapping[str, Tensor], *, num_updates: int) -> None:
        """Average the weights after update `num_updates`, in place; parts if they are sharded."""
        for length, averages in self.tracked.items():
            torch._foreach_lerp_(
                [local_part(averages[name]) for name in weights],
                list(weights.values()),
                1 - power_decay(length, num_updates),
            )

    def keep_in(self, dirpath: object, *, is_first: bool) -> None:
        """Put snapshots below a run's checkpoints, with those of the run that it continues.

        Args:
            dirpath: Folder of the checkpoints; `None` for no snapshots.
            is_first: Whether this rank writes them.

        Raises:
            ConfigError: If the folder is not a local one.
        """
        if "://" in str(dirpath):
            raise ConfigError(
                f"lengths: must be none unless checkpoint.dirpath is local, found "
                f"{list(self.tracked)} with {dirpath}"
            )
        earlier = self.folder
        self.folder = None if dirpath is None else snapshot_folder(str(dirpath))
        if is_first and earlier is not None and self.folder is not None:
            link_snapshots(earlier, self.folder, self.snapshots)

    def snapshot(self, trainer: L.Trainer, *, num_updates: int, every: int, most: int) -> None:
        """Write a snapshot if one is due; training goes on if that fails. Collective."""
        interval = kept_interval(num_updates, every=every, most=most)
        if self.folder is None or not self.tracked or num_updates % interval:
            return
        # All ranks gather what is sharded, one tensor at a time; the first keeps and writes it.
        whole: dict[float, dict[str, Tensor]] = {length: {} for length in self.tracked}
        for length, averages in self.tracked.items():
            for name, value in averages.items():
                full = full_tensor(value)
                if trainer.is_global_zero:
                    whole[length][name] = full.cpu()
        digest = None
        if trainer.is_global_zero:
            try:
                digest = write_snapshot(self.folder, num_updates, whole, interval=interval)
            except OSError as error:
                rank_zero_warn(f"ema: no snapshot of update {num_updates}, as {error}")
        digest = trainer.strategy.broadcast(digest)
        self.snapshots = {n: d for n, d in self.snapshots.items() if n % interval == 0}
        if digest is not None:
            self.snapshots[num_updates] = digest

    def of_length(self, length: float, *, num_updates: int) -> dict[str, Tensor]:
        """The average of a length: the tracked one, or a combination of snapshots.

        Raises:
            ConfigError: If nothing was tracked, or the snapshots cannot give that length.
        """
        if length in self.tracked:
            return self.tracked[length]
        if self._combined is None or self._combined[0] != (num_updates, length):
            found, said = average_from(
                self.snapshots, self.folder, self.tracked, num_updates=num_updates, length=length
            )
            rank_zero_only(print)(f"ema: {said}")
            self._combined = (num_updates, length), found
        return self._combined[1]

    def state_dict(self) -> dict[str, Any]:
        """The averages and the digests of the snapshots; nothing if none is tracked."""
        if not self.tracked:
            return {}
        powers = {length: dict(averages) for length, averages in self.tracked.items()}
        return {"powers": powers, "snapshots": dict(self.snapshots)}

    @classmethod
    def of_state(cls, state: Mapping[str, Any], folder: Path | None) -> PowerAverages:
        """From the state in a checkpoint, with the folder of its snapshots."""
        made = cls()
        made.folder = folder
        for length, averages in state.get("powers", {}).items():
            made.tracked[float(length)] = {name: value.clone() for name, value in averages.items()}
        made.snapshots = {int(n): str(digest) for n, digest in state.get("snapshots", {}).items()}
        return made


def snapshot_folder(dirpath: str | Path) -> Path:
    """Where the snapshots of a run are whose checkpoints are in `dirpath`."""
    return Path(dirpath) / "ema"
