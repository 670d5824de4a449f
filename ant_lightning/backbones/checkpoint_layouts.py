"""Where each kind of checkpoint file keeps the backbone's weights, and under which names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from torch import Tensor

from ant_lightning.errors import ConfigError

Weights = Literal["ema", "model"]

FIRST_STAGE_PREFIX = "first_stage_model."
_LDM_PREFIX = "model.diffusion_model."
_LDM_EMA_PREFIX = "model_ema."
_LIGHTNING_PREFIX = "backbone."
# Parts of names that torch's wrappers add: `torch.compile`, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# The UNet's class table: its name in our network, and in latent-diffusion's files. Those keep the
# table outside the UNet, as the conditioning stage.
_CLASS_TABLE = ("class_embedder.embedding.weight", "cond_stage_model.embedding.weight")


@dataclass(frozen=True, kw_only=True)
class CheckpointReport:
    """What was found in a file: the backbone's weights, and the entries that were left out.

    Attributes:
        path: The file.
        layout: `state dict`, `training file`, `latent-diffusion`, `lightning` or `diffusers`.
        weights: `ema` or `model`; `None` for a bare state dict, which holds one set.
        num_tensors: Number of tensors found for the backbone.
        num_parameters: Number of values in these tensors.
        ignored: Number of entries left out, by the first part of their name (`optimizer`, ...).
        adapted: What was made anew for another number of classes or another size of images.
    """

    path: Path
    layout: str
    weights: Weights | None
    num_tensors: int
    num_parameters: int
    ignored: dict[str, int]
    adapted: tuple[str, ...] = ()

    def __str__(self) -> str:
        which = "" if self.weights is None else f", {self.weights} weights"
        left = ", ".join(f"{name} ({count})" for name, count in sorted(self.ignored.items()))
        return (
            f"{self.path}: {self.layout}{which}, {self.num_tensors} tensors, "
            f"{self.num_parameters} parameters; left out: {left or 'nothing'}"
            + "".join(f"; {each}" for each in self.adapted)
        )


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Map each name, freed of what torch's wrappers add, to the original name.

    `torch.compile` adds `_orig_mod.`, `DistributedDataParallel` a leading `module.`. If two names
    would become equal, all names are left as they are.
    """
    names = list(names)
    bare = {_bare_name(name): name for name in names}
    return bare if len(bare) == len(names) else {name: name for name in names}


def _bare_name(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    # DDP around the backbone alone, inside a LightningModule.
    while len(parts) > 2 and parts[:2] == ["backbone", "module"]:
        del parts[1]
    return ".".join(parts)


def _bare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {bare: tensors[name] for bare, name in bare_names(tensors).items()}


def nested_tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file by bare name: those under `state_dict`, else those at the top level."""
    nested = content.get("state_dict", content)
    items = nested.items() if isinstance(nested, Mapping) else ()
    return _bare({n: v for n, v in items if isinstance(n, str) and isinstance(v, Tensor)})


def find_weights(
    content: Mapping[str, Any], names: Iterable[str], *, weights: Weights, path: Path
) -> tuple[dict[str, Tensor], CheckpointReport]:
    """Find the backbone's weights in a file's content.

    Args:
        content: What the file holds.
        names: The bare names of the backbone's state dict.
        weights: Which of the two sets, in files that hold both.
        path: The file, for messages.

    Returns:
        The tensors by their name in the backbone, and the report. A tensor that the backbone does
        not have keeps its name in the file; the caller reports it as extra.

    Raises:
        ConfigError: If the file has no weights, or not the requested ones.
    """
    tensors = nested_tensors(content)
    training = {key: content[key] for key in ("model", "ema") if _is_state_dict(content.get(key))}
    # In this order, because a bare state dict has no mark of its own: it is what matches no other.
    ignored: Iterable[object]
    which: Weights | None = weights
    if training:
        layout = "training file"
        found = _bare(training[_requested(weights, training, path)])
        ignored = [key for key in content if key != weights]
    elif not tensors:
        raise ConfigError(
            f"{path}: must hold weights under state_dict, model, ema or its own top level, found "
            f"the keys {sorted(map(str, content))[:10]}"
        )
    elif any(name.startswith(_LDM_PREFIX) for name in tensors):
        layout = "latent-diffusion"
        stored = _latent_diffusion_names(tensors, set(names), weights=weights, path=path)
        found = {name: tensors[stored_name] for name, stored_name in stored.items()}
        ignored = tensors.keys() - stored.values()
    elif any(name.startswith(_LIGHTNING_PREFIX) for name in tensors):
        layout = "lightning"
        live = _below(tensors, _LIGHTNING_PREFIX)
        averages = _averages(content)
        found = live
        if _requested(weights, ["model", *(["ema"] if averages else [])], path) == "ema":
            found = live | _bare(averages)  # a frozen parameter has no average
        ignored = [name for name in tensors if not name.startswith(_LIGHTNING_PREFIX)]
    else:
        layout, which, found = "state dict", None, tensors
        has_dict = "state_dict" in content
        ignored = [n for n, v in content.items() if has_dict or not isinstance(v, Tensor)]
    return found, CheckpointReport(
        path=path,
        layout=layout,
        weights=which,
        num_tensors=len(found),
        num_parameters=sum(value.numel() for value in found.values()),
        ignored=dict(Counter(str(name).split(".")[0] for name in ignored)),
    )


def _is_state_dict(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether this is a non-empty mapping of names to tensors."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(n, str) and isinstance(v, Tensor) for n, v in value.items())


def _requested(weights: Weights, stored: Iterable[str], path: Path) -> Weights:
    """Return `weights` if the file stores that set, else raise."""
    if weights not in stored:
        raise ConfigError(
            f"weights: must be in the file {path}, which holds {', '.join(stored)}, found {weights}"
        )
    return weights


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _latent_diffusion_names(
    tensors: Mapping[str, Tensor], names: set[str], *, weights: Weights, path: Path
) -> dict[str, str]:
    """Map the UNet's names to the names in a latent-diffusion file.

    The file's EMA is stored as buffers, and a buffer's name cannot contain a dot:
    `input_blocks.0.0.weight` becomes `model_ema.diffusion_modelinput_blocks00weight`.
    """
    stored = {name: _LDM_PREFIX + name for name in _below(tensors, _LDM_PREFIX)}
    averages = {n for n in tensors if n.startswith(_LDM_EMA_PREFIX)}
    # Counters of the EMA, not weights.
    averages -= {_LDM_EMA_PREFIX + "decay", _LDM_EMA_PREFIX + "num_updates"}
    if _requested(weights, ["model", *(["ema"] if averages else [])], path) == "ema":
        # The dots cannot be put back, so our own names without dots are compared with the file's.
        ours = {_LDM_EMA_PREFIX + f"diffusion_model{n}".replace(".", ""): n for n in names}
        stored = {ours.get(name, name): name for name in averages}
    our_table, their_table = _CLASS_TABLE
    if our_table in names and their_table in tensors:
        stored[our_table] = their_table
    return stored


def _averages(content: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The averaged weights of a Lightning checkpoint, which a callback stores; empty without it."""
    callbacks = content.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, Mapping) else []
    found = [state.get("averages") for state in states if isinstance(state, Mapping)]
    return next((each for each in found if _is_state_dict(each)), {})
