"""Reading a checkpoint file of any origin without running code from it."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ant_lightning.errors import ConfigError

__all__ = ["read_checkpoint"]

# To be run by the user, on a machine and for a file of their choice: it does unpickle anything.
_RESAVE = """python -c "import torch; \
c = torch.load('FILE', map_location='cpu', weights_only=False); \
torch.save({k: c[k] for k in ('state_dict', 'model', 'ema') if k in c} or c, 'weights.pt')\""""


class _LightningCallback:
    """Stands in for a callback class whose name an old Lightning file mentions; does nothing."""


# Names a pickle may mention beyond tensors and containers. DiT's training files hold their
# arguments as a Namespace, a bare bag of values; Lightning up to 1.4 (latent-diffusion's files)
# names its callback's class as a dictionary key, and gets the empty class above for it.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_LightningCallback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
]


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Read a ``.safetensors`` file, or any file that ``torch.save`` wrote, onto the CPU.

    Always with ``weights_only=True``: tensors, containers and plain values are read, and nothing
    in the file can run. Large files are mapped into memory, not copied.

    Raises:
        ConfigError: the file is missing, damaged, or needs pickled classes or functions.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"checkpoint: no such file, found {path}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"checkpoint {path}: must hold a dictionary, found {type(content).__name__}"
        )
    return content


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    """The tensors of a safetensors file."""
    from safetensors import SafetensorError  # noqa: PLC0415 (optional for all other formats)
    from safetensors.torch import load_file  # noqa: PLC0415

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(
            f"checkpoint {path}: truncated or not a safetensors file ({error})"
        ) from error


def _read_torch(path: Path) -> object:
    """What ``torch.save`` put into the file."""
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_records(path)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise _damaged(path) from error
        raise ConfigError(
            f"checkpoint {path}: refused, because reading it would call {found.group(1)}; a file "
            "with such pickles can run any code. Where you trust the file, keep its weights alone "
            f"with: {_RESAVE.replace('FILE', path.name)} or save them as safetensors"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        # Which of these a cut file raises depends on where it was cut.
        raise _damaged(path) from error


def _check_records(path: Path) -> None:
    """Compare every record with its checksum, which ``torch.load`` does not do."""
    try:
        with zipfile.ZipFile(path) as archive:
            # All zero: the writer left the checksums out (an option of torch.save).
            has_checksums = any(record.CRC for record in archive.infolist())
            broken = archive.testzip() if has_checksums else None
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise _damaged(path) from error
    if broken is not None:
        raise ConfigError(
            f"checkpoint {path}: damaged, the checksum of its record {broken} does not agree"
        )


def _damaged(path: Path) -> ConfigError:
    """The error for a file that cannot be read to its end."""
    size = path.stat().st_size
    return ConfigError(
        f"checkpoint {path}: truncated, damaged, or not written by torch.save ({size} bytes)"
    )
