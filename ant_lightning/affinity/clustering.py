"""Clusters of timesteps whose gradients agree, from a measured task affinity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ant_lightning.affinity.result import check_grid, read_affinity_file
from ant_lightning.errors import ConfigError, FileError, check_whole
from ant_lightning.tasks.clusterings import Clustering
from ant_lightning.tasks.clusters import TimestepClusters
from ant_lightning.tasks.costs import affinity_costs
from ant_lightning.tasks.partition import partition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float


class GradientClustering(Clustering):
    """Clusters of similar gradients: the partition with the smallest sum of `affinity_costs`.

    The affinity in a file was measured on a grid of timesteps. `spread_affinity` extends it to all
    timesteps first.

    Args:
        affinity: Affinity `[T, T]`, or the path of a file that `AffinityResult.save` wrote. A
            `.npz` file with the arrays `affinity [n, n]`, `timesteps [n]` and `num_timesteps` is
            read as well.
        num_tasks: Number of clusters `k`.
        weighted: Whether timesteps count by how often training draws them; the paper's do not.

    Raises:
        ConfigError: If `num_tasks` is below 1.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 4, arXiv 2306.00354.

    Examples:
        >>> import torch
        >>> from ant_lightning import GradientClustering
        >>> affinity = torch.block_diag(torch.ones(3, 3), torch.ones(5, 5))
        >>> GradientClustering(affinity, num_tasks=2)(torch.linspace(5, -5, 8)).boundaries
        (0, 3, 8)
    """

    def __init__(
        self, affinity: str | Path | Tensor, num_tasks: int = 5, *, weighted: bool = False
    ) -> None:
        check_whole(1, num_tasks=num_tasks)
        self.weighted = weighted
        self.affinity = affinity
        self.num_tasks = num_tasks

    def __call__(self, log_snr: Float[Tensor, " T"]) -> TimestepClusters:
        """Cluster by affinity.

        Raises:
            ConfigError: If the file is missing or damaged, or the affinity belongs to another
                number of timesteps or another schedule.
        """
        affinity = self.affinity
        if not isinstance(affinity, Tensor):
            affinity = _full_affinity(affinity, log_snr)
        if len(affinity) != len(log_snr):
            raise ConfigError(
                f"affinity: must have the schedule's {len(log_snr)} timesteps, "
                f"found {len(affinity)}"
            )
        costs = affinity_costs(affinity, weights=self._weights())
        return TimestepClusters(partition(costs, self.num_tasks))

    def measured_model(self) -> str | None:
        """Description of the measured model; `None` if the affinity does not come with one."""
        if isinstance(self.affinity, Tensor):
            return None
        return _read(self.affinity)[1]["model"] or None


def spread_affinity(
    affinity: Float[Tensor, "n n"], *, timesteps: Sequence[int], num_timesteps: int
) -> Float[Tensor, "T T"]:
    """Spread affinity from a grid of timesteps to all timesteps, by nearest neighbour.

    Each timestep takes the row and column of the nearest grid point, the lower one of two that are
    equally near. Interpolation would be smoother, but a measured affinity has a spike of 1 on its
    diagonal: interpolated, it becomes a ridge at each grid point, and clusters would prefer centres
    on the grid. With nearest neighbours `affinity[t, t]` is 1 for all t.

    Args:
        affinity: Affinity on the grid.
        timesteps: The grid, increasing, `n` of `0 .. num_timesteps - 1`.
        num_timesteps: `T`.

    Returns:
        `[T, T]`, float64, on the CPU.

    Examples:
        >>> import torch
        >>> from ant_lightning import spread_affinity
        >>> affinity = torch.tensor([[1.0, 0.25], [0.25, 1.0]])
        >>> spread_affinity(affinity, timesteps=[0, 3], num_timesteps=4)[0].tolist()
        [1.0, 1.0, 0.25, 0.25]
    """
    grid = torch.as_tensor(timesteps).double()
    # `searchsorted` has side="left": a timestep midway between two grid points takes the lower.
    nearest = torch.searchsorted((grid[1:] + grid[:-1]) / 2, torch.arange(num_timesteps).double())
    return affinity.cpu().double()[nearest][:, nearest]


def _read(path: str | Path, *names: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`read_affinity_file`, with errors that name the argument."""
    try:
        return read_affinity_file(path, *names)
    except FileError as error:
        raise FileError(f"affinity: {error}") from error


def _full_affinity(path: str | Path, log_snr: Tensor) -> Tensor:
    """The affinity `[T, T]` in a file, checked against the schedule that it is used with."""
    tensors, entries = _read(path, "affinity", "timesteps", "log_snr")
    try:
        num_timesteps, measured = entries["num_timesteps"], tensors["log_snr"]
        affinity, timesteps = tensors["affinity"], tensors["timesteps"].tolist()
        if num_timesteps != len(log_snr):
            raise ConfigError(
                f"must have the schedule's {len(log_snr)} timesteps, found {num_timesteps}"
            )
        # An empty log-SNR means that the file has none.
        check_grid(timesteps, num_timesteps, measured if len(measured) else None)
        if affinity.shape != (len(timesteps), len(timesteps)):
            raise ConfigError(
                f"must have a row and a column for each of {len(timesteps)} timesteps, found shape "
                f"{list(affinity.shape)}"
            )
        # The same timestep of another schedule has another noise level. Two float32 tables of one
        # schedule differ by about 1e-3 at the ends; tables of two schedules by whole units.
        ours = log_snr.detach().double().cpu()
        if len(measured) and not torch.allclose(measured, ours, rtol=1e-3, atol=0.01):
            t = int((measured - ours).abs().nan_to_num(torch.inf).argmax())
            raise ConfigError(
                "must be measured with the schedule that it is used for, found log-SNR "
                f"{measured[t]:.4g} at timestep {t}; the schedule has {ours[t]:.4g}"
            )
    except ConfigError as error:
        raise ConfigError(f"affinity: {path}: {error}") from None
    return spread_affinity(affinity, timesteps=timesteps, num_timesteps=num_timesteps)
