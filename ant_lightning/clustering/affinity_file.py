"""The file in which a measured task affinity is kept, as clustering reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
import torch

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor

__all__ = ["read_affinity", "spread_affinity"]


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
        ConfigError: If the file is missing, is no such archive, its arrays do not fit, or it was
            measured with another schedule.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            affinity, timesteps = file["affinity"], file["timesteps"]
            num_timesteps = int(file["num_timesteps"])
            measured = file["log_snr"] if "log_snr" in file else np.empty(0)
    except (OSError, KeyError, TypeError, ValueError, BadZipFile) as error:
        raise ConfigError(
            "affinity: an .npz file with affinity, timesteps and num_timesteps is needed, "
            f"found {path} ({error})"
        ) from None
    n = len(timesteps) if timesteps.ndim == 1 else 0
    inside = n and (np.diff(timesteps) > 0).all()
    inside = inside and timesteps[0] >= 0 and timesteps[-1] < num_timesteps
    if not inside or affinity.shape != (n, n):
        raise ConfigError(
            f"affinity: increasing timesteps in 0 .. {num_timesteps - 1} and one row and one "
            f"column for each are needed, found {affinity.shape} and {timesteps} in {path}"
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
    if measured.shape != ours.shape:
        raise ConfigError(
            f"affinity: log_snr must have one value for each of {len(ours)} timesteps, found shape "
            f"{measured.shape} in {path}"
        )
    # Tables in float32 differ by 1e-3 or so at the ends; schedules differ by whole units.
    apart = np.abs(measured - ours) > 0.01 + 1e-3 * np.abs(ours)
    if apart.any():
        t = int(apart.argmax())
        raise ConfigError(
            f"affinity: must be measured with the schedule that it is used for; {path} has log-SNR "
            f"{measured[t]:.4g} at timestep {t}, the schedule {ours[t]:.4g}"
        )
