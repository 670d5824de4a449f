"""Affinity as an `.npz` file: all that is needed to draw it again, or to cluster by it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ant_lightning.errors import FileError
from ant_lightning.files.atomic import write_atomically
from ant_lightning.files.npz import open_npz

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from ant_lightning.affinity.result import AffinityResult

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
        FileError: If there is no such file, or it is damaged or of another format.
    """
    with open_npz(path, setting="affinity") as file:
        version = file.number("format_version")
        if version != _VERSION:
            raise FileError(
                f"affinity: format_version must be {_VERSION}, found {version} in {path}"
            )
        (n,) = file.check("timesteps", shape=(None,), kinds="i").shape
        num_timesteps = file.number("num_timesteps")
        sides = file.check("log_snr", shape=(None,), kinds="f").shape
        half_dots = file.read("half_dots", shape=(None, 2, 2, n, n), kinds="f", finite=True)
        log_snr = file.read("log_snr", shape=sides, kinds="f").astype(np.float64)
        return StoredAffinity(
            timesteps=tuple(file.read("timesteps", shape=(n,), kinds="i").tolist()),
            num_timesteps=num_timesteps,
            half_dots=torch.from_numpy(half_dots.astype(np.float64)),
            seed=file.number("seed"),
            model=file.text("model"),
            num_parameters=file.number("num_parameters"),
            sketch_dim=file.number("sketch_dim") or None,
            log_snr=torch.from_numpy(log_snr) if log_snr.size else None,
        )
