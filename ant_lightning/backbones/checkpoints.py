"""Official checkpoints into our backbones: all of a file's weights, or an error and none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ant_lightning.backbones.checkpoint_files import read_checkpoint
from ant_lightning.backbones.checkpoint_layouts import (
    FIRST_STAGE_PREFIX,
    Weights,
    bare_names,
    find_entries,
    nested_tensors,
)
from ant_lightning.errors import ConfigError
from ant_lightning.files.torch_file import not_finite

__all__ = [
    "CheckpointReport",
    "fill_backbone",
    "first_stage_state_dict",
    "load_official_checkpoint",
]

_MAX_LISTED = 10
_CLASS_TABLES = (
    "y_embedder.embedding_table.weight",
    "label_emb.weight",
    "class_embedder.embedding.weight",
)


@dataclass(frozen=True, kw_only=True)
class CheckpointReport:
    """What was loaded, and what was left in the file.

    Attributes:
        path: the file.
        layout: "state dict", "training file", "latent-diffusion" or "lightning".
        weights: "ema" or "model"; None where the file holds just one set.
        num_tensors: entries loaded.
        num_parameters: numbers in them.
        ignored: first part of a name -> entries left out (first stage, optimizer, ..).
    """

    path: Path
    layout: str
    weights: Weights | None
    num_tensors: int
    num_parameters: int
    ignored: dict[str, int]

    def __str__(self) -> str:
        which = "" if self.weights is None else f", {self.weights} weights"
        left = ", ".join(f"{name} ({count})" for name, count in sorted(self.ignored.items()))
        return (
            f"{self.path}: {self.layout}{which}, {self.num_tensors} tensors, "
            f"{self.num_parameters} parameters; left out: {left or 'nothing'}"
        )


def load_official_checkpoint(
    backbone: nn.Module, path: str | Path, *, weights: Weights = "ema"
) -> CheckpointReport:
    """Load a published checkpoint into a DiT or UNet of the same architecture, in place.

    Known files: raw state dicts (guided-diffusion, P2, released DiT weights), training files of
    DiT and ANT (``model``/``ema``), latent-diffusion's ``.ckpt``, this package's own Lightning
    checkpoints, and the same in safetensors. What ``torch.compile``, DDP or FSDP added to names is
    left out, in the file and in the backbone. Values are cast to the backbone's dtype and moved to
    its device. The backbone changes only if every entry fits.

    Args:
        backbone: the network to fill.
        path: the file.
        weights: "ema" or "model", in files that hold both.

    Returns:
        What was loaded and what was left out.

    Raises:
        ConfigError: the file is missing, damaged or would run code, holds no such weights, or
            has missing, extra or misshapen entries or another class count.
    """
    path = Path(path)
    return fill_backbone(backbone, read_checkpoint(path), path=path, weights=weights)


def fill_backbone(
    backbone: nn.Module, content: Mapping[str, Any], *, path: Path, weights: Weights
) -> CheckpointReport:
    """`load_official_checkpoint` of a file that was read already.

    Args:
        backbone: the network to fill.
        content: what the file holds.
        path: the file, for messages.
        weights: "ema" or "model", in files that hold both.

    Raises:
        ConfigError: as `load_official_checkpoint`, but for reading.
    """
    own = backbone.state_dict()
    if any(value.is_meta for value in own.values()):
        raise ConfigError(f"backbone: must have memory to load {path} into, found the meta device")
    own_names = bare_names(own)
    target = {bare: own[name] for bare, name in own_names.items()}
    entries = find_entries(content, target, weights=weights, path=path)
    problems = _class_problems(entries.tensors, target) + _entry_problems(entries.tensors, target)
    if problems:
        raise ConfigError(f"checkpoint {path}: does not fit the network; " + "; ".join(problems))
    backbone.load_state_dict({own_names[name]: t for name, t in entries.tensors.items()})
    return CheckpointReport(
        path=path,
        layout=entries.layout,
        weights=entries.weights,
        num_tensors=len(target),
        num_parameters=sum(value.numel() for value in target.values()),
        ignored=entries.ignored,
    )


def first_stage_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The autoencoder inside a latent-diffusion checkpoint, in its own names, on the CPU.

    Raises:
        ConfigError: the file cannot be read, or has no first stage.
    """
    prefix = FIRST_STAGE_PREFIX
    tensors = nested_tensors(read_checkpoint(path))
    found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not found:
        raise ConfigError(f"checkpoint {path}: holds no first stage (no name starts with {prefix})")
    return found


def _class_problems(found: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Say in terms of classes where the label tables disagree, in a file of such a network."""
    problems: list[str] = []
    if not found.keys() & target.keys():
        return problems
    for name in _CLASS_TABLES:
        rows = [len(side[name]) if name in side else 0 for side in (found, target)]
        if rows[0] != rows[1]:
            problems.append(
                f"num_classes: the file's class table {name} has {rows[0]} rows, the network's "
                f"{rows[1]} (a null class counts as one)"
            )
    return problems


def _entry_problems(found: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """List missing, extra and misshapen entries, and those with a NaN or an infinity."""
    misshapen = [
        f"{name} {list(found[name].shape)} instead of {list(value.shape)}"
        for name, value in target.items()
        if name in found and found[name].shape != value.shape
    ]
    groups = {
        "missing": [name for name in target if name not in found],
        "extra": sorted(name for name in found if name not in target),
        "misshapen": misshapen,
        "not finite": not_finite({name: found[name] for name in target if name in found}),
    }
    return [f"{len(names)} {kind}: {_listed(names)}" for kind, names in groups.items() if names]


def _listed(names: list[str]) -> str:
    """The first names, and that there are more."""
    return ", ".join(names[:_MAX_LISTED]) + (", .." if len(names) > _MAX_LISTED else "")
