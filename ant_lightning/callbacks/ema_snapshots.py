"""Snapshots of power-function averages on the disk, and the averages made from them afterwards."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.backbones.checkpoint_layouts import bare_names
from ant_lightning.balancing.local_parts import full_tensor
from ant_lightning.callbacks.power_function import profile_coefficients
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.atomic import write_atomically
from ant_lightning.files.identity import tensors_digest
from ant_lightning.files.torch_file import read_torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

Averages = dict[str, "Tensor"]  # by name of the parameter

# Relative error of a profile above which another length is asked for. 0.02 is the distance between
# two profiles whose lengths differ by about 2%.
_MAX_ERROR = 0.02


def kept_interval(num_updates: int, *, every: int, most: int) -> int:
    """Updates from one snapshot to the next, of those that are kept after so many updates.

    The interval starts at `every` and doubles when `most` snapshots would be exceeded: those of a
    run of any length are evenly spaced, and between half of `most` and `most`. It depends on the
    count alone, so a resumed run makes the same ones.
    """
    interval = every
    while num_updates > most * interval:
        interval *= 2
    return interval


def write_snapshot(
    folder: Path, num_updates: int, averages: Mapping[float, Averages], *, interval: int
) -> str:
    """Write one file with the averages of all lengths, and remove those off the interval.

    Returns:
        A digest of the averages, by which a checkpoint knows the snapshots of its own run.

    Raises:
        OSError: If the file cannot be written.
    """
    digest = tensors_digest(value for one in averages.values() for value in one.values())
    content = {"averages": dict(averages), "digest": digest}
    write_atomically(folder / f"update_{num_updates}.pt", lambda file: torch.save(content, file))
    for number, path in _present(folder).items():
        if number < num_updates and number % interval:
            path.unlink(missing_ok=True)
    return digest


def link_snapshots(source: Path, target: Path, numbers: Iterable[int]) -> None:
    """Give a run that continues in another folder the snapshots it was continued from.

    Links, because files are replaced and never changed; copies where links are impossible.
    """
    present = _present(source)
    for path in [present[number] for number in numbers if number in present]:
        target.mkdir(parents=True, exist_ok=True)
        if (target / path.name).exists():
            continue
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)


def average_from(
    snapshots: Mapping[int, str],
    folder: Path | None,
    tracked: Mapping[float, Averages],
    *,
    num_updates: int,
    length: float,
) -> tuple[Averages, str]:
    """The average of a length that was not tracked, combined from those that were.

    Args:
        snapshots: Digests of the run's earlier snapshots by their number of updates.
        folder: Where they are; `None` if unknown.
        tracked: The averages after `num_updates`, by length.
        num_updates: Updates made.
        length: The length.

    Returns:
        The average, on the CPU, and one line that says how it was made.

    Raises:
        ConfigError: If nothing was tracked, or the snapshots cannot give that length.
        FileError: If a snapshot is damaged.
    """
    if not tracked:
        raise ConfigError(
            f"length: needs averages that were tracked in training (ema.lengths), found {length} "
            "and none of these"
        )
    now = {name: value for one in tracked.values() for name, value in one.items()}
    files = dict(_of_run(folder, snapshots, now, num_updates))
    points = [(n, each) for n, averages in files.items() for each in averages]
    points += [(num_updates, each) for each in tracked]
    coefficients, error = profile_coefficients(points, num_updates, length)
    lengths = ", ".join(f"{each:g}" for each in sorted(tracked))
    made = f"from lengths {lengths} and {len(files)} snapshots in {folder}"
    if error > _MAX_ERROR:
        raise ConfigError(
            f"length: must be one that the run's averages can give, found {length:g}, whose "
            f"profile would be off by {error:.1%} {made}"
        )
    # One file after the other: together they may be larger than the memory.
    found: Averages = {}
    for (n, each), factor in zip(points, coefficients, strict=True):
        source = tracked[each] if n == num_updates else files[n][each]
        for name in now:
            value = full_tensor(source[name]).cpu() * float(factor)
            found[name] = found[name].add_(value) if name in found else value
    return found, f"length {length:g} {made}, its profile off by {error:.1e}"


def _of_run(
    folder: Path | None, snapshots: Mapping[int, str], now: Averages, num_updates: int
) -> Iterable[tuple[int, dict[float, Averages]]]:
    """The earlier snapshots of this run that are still there and have every parameter."""
    for number, path in sorted(_present(folder).items() if folder is not None else ()):
        if number not in snapshots or number >= num_updates:
            continue
        averages = _read(path, snapshots[number])
        # Only one of the two networks may be wrapped, as by `torch.compile`.
        own = bare_names(now)
        averages = {
            length: {own.get(bare, name): one[name] for bare, name in bare_names(one).items()}
            for length, one in averages.items()
        }
        # A parameter that was thawed later is in none of the earlier ones.
        if all(now.keys() <= one.keys() for one in averages.values()):
            yield number, averages


def _read(path: Path, digest: str) -> dict[float, Averages]:
    """The averages in a snapshot, by length."""
    content: Any = read_torch(path)
    averages = content.get("averages") if isinstance(content, dict) else None
    if not isinstance(averages, dict) or not all(
        isinstance(length, float) and isinstance(one, dict) for length, one in averages.items()
    ):
        raise FileError(f"{path}: must hold averages of weights, found none")
    if content.get("digest") != digest:
        raise ConfigError(
            f"length: needs the snapshots of this run, found one of another at {path}"
        )
    return averages


def _present(folder: Path) -> dict[int, Path]:
    """The snapshots in a folder by their number of updates."""
    found = {path: re.fullmatch(r"update_(\d+)\.pt", path.name) for path in folder.glob("*.pt")}
    return {int(match[1]): path for path, match in found.items() if match}
