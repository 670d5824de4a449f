"""The file in which a measured task affinity is kept, as clustering reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.npz import open_npz

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor

__all__ = ["measured_model", "read_affinity", "spread_affinity"]

_MAX_TIMESTEPS = 10_000  # the matrix of all pairs is 800 MB then


def read_affinity(
    path: Path, *, log_snr: Float[Tensor, " T"] | None = None
) -> Float[Tensor, "T T"]:
    """The affinity in an `.npz` file, spread from its grid of timesteps to all of them.

    See `spread_affinity`.

    Args:
        path: A file with the arrays `affinity [n, n]`, `timesteps [n]` (increasing) and
            `num_timesteps` (one number, `T`), and perhaps `log_snr [T]` of the schedule that it was
            measured with; read without unpickling anything.
        log_snr: Of the schedule that it is wanted for; compared if the file has one.

    Returns:
        `[T, T]`, float64.

    Raises:
        FileError: If the file is missing, is no such archive, or its arrays do not fit.
        ConfigError: If it was measured with another schedule.
    """
    with open_npz(path, setting="affinity") as file:
        num_timesteps = file.number("num_timesteps")
        if not 1 <= num_timesteps <= _MAX_TIMESTEPS:
            raise FileError(
                f"affinity: num_timesteps must be from 1 to {_MAX_TIMESTEPS}, found "
                f"{num_timesteps} in {path}"
            )
        (n,) = file.check("timesteps", shape=(None,), kinds="iu").shape
        if not 1 <= n <= num_timesteps:
            raise FileError(
                f"affinity: increasing timesteps in 0 .. {num_timesteps - 1} are needed, found {n} "
                f"in {path}"
            )
        timesteps = file.read("timesteps", shape=(n,), kinds="iu").astype(np.int64)
        affinity = file.read("affinity", shape=(n, n), finite=True)
        has_schedule = "log_snr" in file and file.headers["log_snr"].shape != (0,)
        measured = (
            file.read("log_snr", shape=(num_timesteps,), finite=True)
            if has_schedule
            else np.empty(0)
        )
    if (np.diff(timesteps) <= 0).any() or timesteps[0] < 0 or timesteps[-1] >= num_timesteps:
        raise FileError(
            f"affinity: increasing timesteps in 0 .. {num_timesteps - 1} are needed, found "
            f"{timesteps} in {path}"
        )
    if log_snr is not None:
        if num_timesteps != len(log_snr):
            raise ConfigError(
                f"affinity: must be of the schedule's {len(log_snr)} timesteps, found "
                f"{num_timesteps} in {path}"
            )
        if measured.size:
            _check_schedule(measured, log_snr, path)
    return spread_affinity(
        torch.from_numpy(affinity), timesteps=timesteps.tolist(), num_timesteps=num_timesteps
    )


def measured_model(path: Path) -> str:
    """What the affinity in a file was measured of, in words; empty if it does not say.

    Raises:
        FileError: If the file is missing or is no such archive.
    """
    with open_npz(path, setting="affinity") as file:
        return file.text("model") if "model" in file else ""


def spread_affinity(
    affinity: Float[Tensor, "n n"], *, timesteps: Sequence[int], num_timesteps: int
) -> Float[Tensor, "T T"]:
    """Affinity on a grid of timesteps, spread to all of them.

    Every timestep takes the row and the column of the nearest grid point, of two equally near
    ones the lower. Interpolation would be smoother, but a measured affinity has a spike of 1 on
    its diagonal, and interpolating turns that into ridges at the grid points, so that a centre on
    the grid would look more like its cluster than one beside it. This way `affinity[t, t]` stays
    1 for all t and all centres are treated alike.

    Args:
        affinity: Of the grid.
        timesteps: The grid, increasing, `n` of `0 .. num_timesteps - 1`.
        num_timesteps: `T`.

    Returns:
        `[T, T]`, float64, on the CPU.
    """
    grid = np.asarray(timesteps)
    middles = (grid[1:] + grid[:-1]) / 2
    nearest = torch.from_numpy(np.searchsorted(middles, np.arange(num_timesteps), side="left"))
    return affinity.cpu().double()[nearest][:, nearest]


def _check_schedule(measured: np.ndarray, log_snr: Tensor, path: Path) -> None:
    """Affinity belongs to noise levels: the same timestep of another schedule is another task."""
    ours = log_snr.detach().double().cpu().numpy()
    # Tables in float32 differ by 1e-3 or so at the ends; schedules differ by whole units.
    apart = np.abs(measured - ours) > 0.01 + 1e-3 * np.abs(ours)
    if apart.any():
        t = int(apart.argmax())
        raise ConfigError(
            f"affinity: must be measured with the schedule that it is used for; {path} has log-SNR "
            f"{measured[t]:.4g} at timestep {t}, the schedule {ours[t]:.4g}"
        )
