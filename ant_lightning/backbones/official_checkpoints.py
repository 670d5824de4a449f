"""Loads a published checkpoint into a backbone: either every weight fits, or none is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ant_lightning.backbones.checkpoint_layouts import (
    CheckpointReport,
    Weights,
    bare_names,
    find_weights,
)
from ant_lightning.backbones.diffusers_folder import (
    FOLDER_CONFIG,
    diffusers_weights,
    read_folder,
)
from ant_lightning.backbones.dit import position_embedding
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.checkpoint_shards import check_shards, fill_shards
from ant_lightning.files.safetensors_file import read_safetensors
from ant_lightning.files.torch_file import not_finite, read_torch


class _LightningCallback:
    """Empty stand-in for the callback class that old Lightning files refer to by name."""


# Classes that a pickle may name beyond tensors and containers. DiT's training files store their
# arguments as a Namespace, which only holds values. Lightning up to 1.4 (latent-diffusion's files)
# uses a callback's class as a dictionary key; the empty class above is loaded in its place.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_LightningCallback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
]
_MAX_LISTED = 10
_POSITIONS = "pos_embed"
# Of DiT, ADM and LDM. A wrong number of rows is reported as `num_classes`, which the user can set.
_CLASS_TABLES = (
    "y_embedder.embedding_table.weight",
    "label_emb.weight",
    "class_embedder.embedding.weight",
)


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Read a folder of diffusers, a `.safetensors` file, or any file that `torch.save` wrote.

    Everything is on the CPU. No code in the file can run; see `read_torch`. Large
    files are mapped into memory, not copied.

    Raises:
        FileError: If the file is missing, damaged, or needs pickled classes or functions.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    content = read_torch(path, allowed=_HARMLESS)
    if not isinstance(content, Mapping):
        raise FileError(f"{path}: must hold a dictionary, found {type(content).__name__}")
    if "shards" in content and "pytorch-lightning_version" in content:
        content = dict(content)
        check_shards(path, content["shards"])
        fill_shards(path, content)
    return content


def load_official_checkpoint(
    backbone: nn.Module, path: str | Path, *, weights: Weights = "ema", adapt: bool = False
) -> CheckpointReport:
    """Load a published checkpoint into a DiT or UNet of the same architecture, in place.

    Known files: raw state dicts (guided-diffusion, P2, released DiT weights), training files of
    DiT and ANT (`model`, `ema`), latent-diffusion's `.ckpt`, this package's own Lightning
    checkpoints, the same in safetensors, and folders of diffusers (of a network that ours would be
    exported as, or of its pipeline). What `torch.compile`, DDP or FSDP add to names is
    ignored, in the file and in the backbone. Values are cast to the backbone's dtype and moved to
    its device. If one entry does not fit, the backbone is left unchanged.

    Args:
        backbone: The network to fill.
        path: The file or the folder.
        weights: Which set to load, `ema` or `model`, from files that hold both.
        adapt: Whether a network for other classes or another size of images is filled: its class
            table stays as it was made, and so do sinusoidal positions of a DiT; others are
            interpolated. The report says so.

    Returns:
        What was loaded, and what was left out.

    Raises:
        ConfigError: If the file is missing, is damaged, would run code, or does not hold the
            requested weights; if entries are missing, extra, misshapen or not finite; if the number
            of classes differs.

    Examples:
        >>> import torch
        >>> from tempfile import NamedTemporaryFile
        >>> from ant_lightning import DiT, load_official_checkpoint
        >>> dit = DiT(input_size=4, hidden_size=8, depth=1, num_heads=2, num_classes=3)
        >>> with NamedTemporaryFile(suffix=".pt") as file:
        ...     torch.save({"ema": dit.state_dict(), "opt": {}}, file.name)
        ...     report = load_official_checkpoint(dit, file.name)
        >>> report.layout, report.num_tensors, report.ignored
        ('training file', 22, {'opt': 1})
    """
    path = Path(path)
    content = read_checkpoint(path)
    return fill_backbone(backbone, content, path=path, weights=weights, adapt=adapt)


def fill_backbone(
    backbone: nn.Module,
    content: Mapping[str, Any],
    *,
    path: Path,
    weights: Weights,
    adapt: bool = False,
    held: Collection[str] = (),
) -> CheckpointReport:
    """Load the content of a checkpoint that was read before; see `load_official_checkpoint`.

    The backbone keeps its own values of the names in `held`.
    """
    own = backbone.state_dict()
    if any(value.is_meta for value in own.values()):
        raise ConfigError(f"backbone: must have memory to load {path} into, found the meta device")
    own_names = bare_names(own)
    target = {bare: own[name] for bare, name in own_names.items() if name not in held}
    if FOLDER_CONFIG in content:
        tensors = _of_diffusers(backbone, content, target, path)
        content = {"state_dict": tensors}
    tensors, report = find_weights(content, target, weights=weights, path=path)
    if adapt:
        grid = getattr(backbone, "_grid", None)
        tensors, adapted = _adapted(tensors, target, grid)
        report = replace(report, adapted=adapted)
    problems = _problems(tensors, target)
    if problems:
        raise ConfigError(f"{path}: must fit the network, found " + "; ".join(problems))
    filled = {own_names[name]: tensor for name, tensor in tensors.items()}
    backbone.load_state_dict({name: own[name] for name in held} | filled)
    return report


def _of_diffusers(
    backbone: nn.Module, content: Mapping[str, Any], target: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    shapes = {name: tuple(value.shape) for name, value in target.items()}
    return diffusers_weights(backbone, content, shapes, path)


def _adapted(
    found: Mapping[str, Tensor], target: Mapping[str, Tensor], grid: tuple[int, int] | None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Keep the network's own class table and positions where the file has others.

    Positions that are not sinusoidal, on a square, are interpolated to `grid`.
    """
    tensors, said = dict(found), []
    for name in _CLASS_TABLES:
        rows = [len(side[name]) if name in side else 0 for side in (found, target)]
        if rows[0] == rows[1] or not set(found) & set(target):
            continue
        tensors.pop(name, None)
        if rows[1]:
            tensors[name] = target[name]
        said.append(f"class table made anew ({rows[0]} rows in the file, {rows[1]} here)")
    given, own = found.get(_POSITIONS), target.get(_POSITIONS)
    if given is not None and own is not None and given.shape != own.shape:
        side = math.isqrt(given.shape[1])
        square = position_embedding(given.shape[2], (side, side))
        learned = square.shape == given.shape and not torch.allclose(
            square, given.float(), atol=1e-3
        )
        tensors[_POSITIONS] = own
        if learned and grid is not None:
            image = given.float().transpose(1, 2).unflatten(2, (side, side))
            resized = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
            tensors[_POSITIONS] = resized.flatten(2).transpose(1, 2)
        how = "interpolated" if learned else "computed anew"
        said.append(f"positions {how} ({given.shape[1]} in the file, {own.shape[1]} here)")
    return tensors, tuple(said)


def _problems(found: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Why the entries do not fit: a wrong number of classes, and lists of entries that differ."""
    both = [name for name in target if name in found]
    problems = []
    # Without a name in common the file belongs to another network: classes are not the problem.
    for name in _CLASS_TABLES if both else ():
        rows = [len(side[name]) if name in side else 0 for side in (found, target)]
        if rows[0] != rows[1]:
            problems.append(
                f"num_classes: the file's class table {name} has {rows[0]} rows, the network's "
                f"{rows[1]} (a null class counts as one)"
            )
    kinds = {
        "missing": [name for name in target if name not in found],
        "extra": sorted(name for name in found if name not in target),
        "misshapen": [
            f"{name} {list(found[name].shape)} instead of {list(target[name].shape)}"
            for name in both
            if found[name].shape != target[name].shape
        ],
        "not finite": not_finite({name: found[name] for name in both}),
    }
    for kind, names in kinds.items():
        if names:
            more = ", .." if len(names) > _MAX_LISTED else ""
            problems.append(f"{len(names)} {kind}: {', '.join(names[:_MAX_LISTED])}{more}")
    return problems
