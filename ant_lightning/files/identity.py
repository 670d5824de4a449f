"""Identities: what a stored file was made from, compared with the current run before reuse.

An identity is a flat mapping of names to plain values: settings by name, and digests of what is
too large to store (images, weights). If a value differs, the error names it.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from ant_lightning.errors import FileError
from ant_lightning.files.json_file import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor


def differences(
    stored: Mapping[str, Any], current: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The names whose values differ, each with the stored and the current value.

    Values are compared as JSON, so a tuple equals a list. A name that is missing on one side has
    the value "nothing" there. If the value of a name differs, the names below it are not listed:
    another `model.optimization.optimizer` has another `model.optimization.optimizer.lr` anyway.
    """
    # Through JSON and back: what was read from a file has lists where the run has tuples.
    stored, current = json.loads(json.dumps(dict(stored))), json.loads(json.dumps(dict(current)))
    names = [*current, *(name for name in stored if name not in current)]
    pairs = {name: (stored.get(name, "nothing"), current.get(name, "nothing")) for name in names}
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return {
        name: pair
        for name, pair in different.items()
        if not any(name.startswith(f"{owner}.") for owner in different)
    }


def check_identity(
    path: Path, current: Mapping[str, Any], *, setting: str, content: Path | None = None
) -> bool:
    """Compare `current` with the identity stored in the JSON file `path`.

    Args:
        path: The JSON file.
        current: The identity of the content that this run would write.
        setting: The setting that the message names: the user can change it to avoid the conflict.
        content: The file or folder that the identity describes; by default the folder of `path`.

    Returns:
        Whether an identity is stored at `path`.

    Raises:
        FileError: If the stored identity differs; names the first value that does.
    """
    if not path.exists():
        return False
    # The first difference ends the loop.
    for name, (then, now) in differences(read_json(path, kind=dict), current).items():
        raise FileError(
            f"{setting}: {content or path.parent} holds content made with {name} "
            f"{shortened(then)}, and this run has {shortened(now)}; choose another place, or "
            "delete what is there"
        )
    return True


def shortened(value: object) -> str:
    """A value as text for a message, cut to 100 characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """A digest of the values, shapes, dtypes and order of `tensors`."""
    import torch  # noqa: PLC0415 - the rest of this file is used without it

    digest = hashlib.sha256()
    for tensor in tensors:
        whole = tensor.detach().cpu().contiguous()
        digest.update(f"{whole.dtype} {tuple(whole.shape)};".encode())
        if whole.numel():
            digest.update(whole.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
