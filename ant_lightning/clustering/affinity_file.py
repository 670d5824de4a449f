"""The file in which a measured task affinity is kept, as clustering reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
import torch

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor

__all__ = ["read_affinity"]


def read_affinity(path: Path) -> Float[Tensor, "T T"]:
    """The affinity in an `.npz` file, spread from its grid of timesteps to all of them.

    Every timestep takes the row and the column of the nearest grid point, of two equally near
    ones the lower. Interpolation would be smoother, but a measured affinity has a spike of 1 on
    its diagonal, and interpolating turns that into ridges at the grid points, so that a centre on
    the grid would look more like its cluster than one beside it. This way `affinity[t, t]` stays
    1 for all t and all centres are treated alike.

    Args:
        path: A file with the arrays `affinity [n, n]`, `timesteps [n]` (increasing) and
            `num_timesteps` (one number, `T`); read without unpickling anything.

    Returns:
        `[T, T]`, float64.

    Raises:
        ConfigError: If the file is missing, is no such archive, or its arrays do not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            affinity, timesteps = file["affinity"], file["timesteps"]
            num_timesteps = int(file["num_timesteps"])
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
    middles = (timesteps[1:] + timesteps[:-1]) / 2
    nearest = np.searchsorted(middles, np.arange(num_timesteps), side="left")
    return torch.from_numpy(affinity[np.ix_(nearest, nearest)]).double()
