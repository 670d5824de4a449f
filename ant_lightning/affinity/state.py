"""Whose rows are in a folder: so that a killed run goes on, and another run's rows are refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ant_lightning.errors import ConfigError
from ant_lightning.files.atomic import write_atomically
from ant_lightning.files.npz import open_npz

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["claim_folder"]

_VERSION = 1
_FILE = "identity.npz"


def claim_folder(folder: Path, identity: Mapping[str, str | int | tuple[int, ...]]) -> None:
    """Write whose rows the folder holds, or check that they are of the same measurement.

    Args:
        folder: Made if missing.
        identity: All that a row depends on, by name.

    Raises:
        ConfigError: If the folder holds the rows of another measurement; the message names what
            differs, with both values.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"state_path: must be a folder, found the file {folder}")
    wanted = {"format_version": np.asarray(_VERSION)}
    wanted |= {name: np.asarray(value) for name, value in identity.items()}
    path = folder / _FILE
    if not path.exists():
        # Ranks that share a folder may all do this: they write the same bytes.
        write_atomically(path, lambda file: np.savez(file, **wanted))  # type: ignore[arg-type]
        return
    with open_npz(path, setting="state_path") as file:
        kept = {
            name: file.read(name, shape=header.shape, kinds="iufbU")
            for name, header in file.headers.items()
        }
    differing = [
        f"{name} is {_shown(kept.get(name))} there and {_shown(value)} here"
        for name, value in wanted.items()
        if name not in kept or not np.array_equal(kept[name], value)
    ]
    if differing:
        raise ConfigError(
            f"state_path: must hold the same measurement, found another in {folder}: "
            f"{'; '.join(differing)}"
        )


def _shown(value: np.ndarray | None) -> str:
    if value is None:
        return "missing"
    if value.ndim == 0:
        return repr(value.item())
    return f"{value.size} values {np.array2string(value, threshold=8, edgeitems=3)}"
