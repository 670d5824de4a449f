"""Reading a checkpoint file of any origin without running code from it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ant_lightning.errors import FileError
from ant_lightning.files.safetensors_file import read_safetensors
from ant_lightning.files.torch_file import read_torch

__all__ = ["read_checkpoint"]


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

    Nothing in the file can run, see `read_torch`. Large files are mapped into memory, not copied.

    Raises:
        FileError: the file is missing, damaged, or needs pickled classes or functions.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    content = read_torch(path, allowed=_HARMLESS)
    if not isinstance(content, Mapping):
        raise FileError(f"{path}: must hold a dictionary, found {type(content).__name__}")
    return content
