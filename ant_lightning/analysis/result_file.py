"""Affinity as an `.npz` file: all that is needed to draw it again, or to cluster by it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch

from ant_lightning.analysis.atomic import write_atomically
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from ant_lightning.analysis.result import AffinityResult

__all__ = ["StoredAffinity", "load_affinity", "save_affinity"]

_VERSION = 1


class StoredAffinity(NamedTuple):
    """The arguments of an `AffinityResult`, as read from a file."""

    timesteps: tuple[int, ...]
    num_timesteps: int
    half_dots: Tensor
    seed: int
    model: str
    num_parameters: int
    sketch_dim: int | None
    log_snr: Tensor | None


def save_affinity(result: AffinityResult, path: str | Path) -> None:
    """Write a result, whole or not at all.

    Arrays: `format_version`, `affinity [n, n]` (the plain cosines, the official definition: what
    `GradientClustering` reads), `timesteps [n]`, `num_timesteps`, `corrected [n, n]` and
    `corrected_standard_error [n, n]` (NaN where there is no estimate), `reliability [n]`,
    `half_dots [c, 2, 2, n, n]`, `log_snr [T]` (empty if unknown), `method`, `sketch_dim` (0 if
    exact), `num_parameters`, `seed`, `model`. All but the names are float64 or int64.
    """
    log_snr = np.empty(0) if result.log_snr is None else result.log_snr.numpy()
    arrays: dict[str, Any] = {
        "format_version": _VERSION,
        "affinity": result.plain.numpy(),
        "timesteps": np.asarray(result.timesteps, dtype=np.int64),
        "num_timesteps": result.num_timesteps,
        "corrected": result.corrected.numpy(),
        "corrected_standard_error": result.corrected_standard_error.numpy(),
        "reliability": result.reliability.numpy(),
        "half_dots": result.half_dots.numpy(),
        "log_snr": log_snr,
        "method": result.method,
        "sketch_dim": result.sketch_dim or 0,
        "num_parameters": result.num_parameters,
        "seed": result.seed,
        "model": result.model,
    }
    write_atomically(Path(path), lambda file: np.savez(file, **arrays))


def load_affinity(path: str | Path) -> StoredAffinity:
    """Read what `save_affinity` wrote; nothing in the file is executed.

    Raises:
        ConfigError: If there is no such file, or it is damaged or of another format.
    """
    try:
        # Opened here: numpy leaves the file of a damaged archive open.
        with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            version = int(file["format_version"])
            if version != _VERSION:
                raise ConfigError(
                    f"affinity: format_version must be {_VERSION}, found {version} in {path}"
                )
            timesteps = file["timesteps"]
            if timesteps.ndim != 1 or timesteps.dtype.kind != "i":
                raise ConfigError(
                    "affinity: timesteps must be a row of integers, found "
                    f"{timesteps.dtype} {timesteps.shape} in {path}"
                )
            log_snr = file["log_snr"].astype(np.float64)
            return StoredAffinity(
                timesteps=tuple(timesteps.tolist()),
                num_timesteps=int(file["num_timesteps"]),
                half_dots=torch.from_numpy(file["half_dots"].astype(np.float64)),
                seed=int(file["seed"]),
                model=str(file["model"]),
                num_parameters=int(file["num_parameters"]),
                sketch_dim=int(file["sketch_dim"]) or None,
                log_snr=torch.from_numpy(log_snr) if log_snr.size else None,
            )
    except ConfigError:
        raise
    except (OSError, KeyError, TypeError, ValueError, EOFError, BadZipFile) as error:
        raise ConfigError(
            f"affinity: an .npz file that task affinity wrote is needed, found {path} ({error})"
        ) from None
