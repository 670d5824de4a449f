"""A cache of reference statistics, each under a hash of everything that it depends on."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ant_lightning.errors import ConfigError
from ant_lightning.generation.reference import ReferenceStatistics, load_reference, save_reference

__all__ = ["cached_reference", "reference_fingerprint"]


def reference_fingerprint(*parts: str | int | Tensor) -> str:
    """A hash of everything that the statistics depend on: data, preprocessing, extractor.

    Args:
        parts: Names and settings, or the images themselves (shape, dtype and values count).
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"tensor {part.dtype} {list(part.shape)};".encode())
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(f"{type(part).__name__} {len(str(part))} {part};".encode())
    return digest.hexdigest()[:32]


def cached_reference(
    cache_dir: str | Path, fingerprint: str, compute: Callable[[], ReferenceStatistics]
) -> ReferenceStatistics:
    """The statistics of that fingerprint from the cache, or computed and stored there.

    Processes may share the folder: files appear whole, and the last writer wins with the same
    content. A file that cannot be read, or is of another fingerprint, is made again.

    Raises:
        ConfigError: The fingerprint cannot be a file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", fingerprint):
        raise ConfigError(
            f"fingerprint must be 1 to 128 letters, digits, - or _, got {fingerprint!r}"
        )
    path = Path(cache_dir) / f"{fingerprint}.npz"
    if path.exists():
        try:
            cached = load_reference(path)
            if cached.fingerprint == fingerprint:
                return cached
            reason = f"it has fingerprint {cached.fingerprint!r}"
        except ConfigError as error:
            reason = str(error)
        warnings.warn(f"cached reference {path} is computed again: {reason}", stacklevel=2)
    reference = replace(compute(), fingerprint=fingerprint)
    save_reference(path, reference)
    return reference
