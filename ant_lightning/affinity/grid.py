"""The timesteps at which affinity is measured."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["check_log_snr", "check_timesteps", "timestep_grid"]

_SHOWN = 8


def timestep_grid(num_timesteps: int, *, num_points: int = 100) -> tuple[int, ...]:
    """At most `num_points` timesteps, evenly spread over `0 .. num_timesteps - 1`, ends included.

    Raises:
        ConfigError: If either number is below 1.
    """
    if min(num_timesteps, num_points) < 1:
        raise ConfigError(
            "num_timesteps and num_points: must be at least 1, found "
            f"{num_timesteps} and {num_points}"
        )
    count = min(num_points, num_timesteps)
    spread = torch.linspace(0, num_timesteps - 1, count, dtype=torch.float64)
    return tuple(spread.round().long().tolist())


def check_timesteps(timesteps: Sequence[int], *, num_timesteps: int) -> None:
    """Check that a grid is increasing and within the schedule.

    Raises:
        ConfigError: If it is not.
    """
    increasing = all(one < two for one, two in pairwise(timesteps))
    if not timesteps or not increasing or timesteps[0] < 0 or timesteps[-1] >= num_timesteps:
        shown = list(timesteps[:_SHOWN])
        raise ConfigError(
            f"timesteps: must increase within 0 .. {num_timesteps - 1}, found {shown}"
            f"{' ...' if len(timesteps) > _SHOWN else ''}"
        )


def check_log_snr(log_snr: Tensor, *, num_timesteps: int) -> None:
    """Check that there is one log-SNR for each timestep of the schedule.

    Raises:
        ConfigError: If there is not.
    """
    if log_snr.shape != (num_timesteps,):
        raise ConfigError(
            f"log_snr: must have one value for each of {num_timesteps} timesteps, found shape "
            f"{tuple(log_snr.shape)}"
        )
