"""Where each kind of published file keeps the backbone's weights, and under which names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ant_lightning.errors import ConfigError

__all__ = [
    "FIRST_STAGE_PREFIX",
    "Entries",
    "Weights",
    "bare_names",
    "find_entries",
    "nested_tensors",
]

Weights = Literal["ema", "model"]
Layout = Literal["state dict", "training file", "latent-diffusion", "lightning"]

FIRST_STAGE_PREFIX = "first_stage_model."
_LDM_PREFIX = "model.diffusion_model."
_LDM_EMA_PREFIX = "model_ema."
_LIGHTNING_PREFIX = "backbone."
# Where torch's wrappers hold the network: compiled, sharded, with checkpointed activations.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Our name of latent-diffusion's class table, and the name in its files, where it is a
# conditioning stage beside the UNet.
_CLASS_TABLE = ("class_embedder.embedding.weight", "cond_stage_model.embedding.weight")


@dataclass(frozen=True, kw_only=True)
class Entries:
    """The backbone's weights as found in one file.

    Attributes:
        layout: kind of file.
        weights: which of its weights these are; None where a file holds just one set.
        tensors: name in the backbone -> value; names nobody knows keep their name in the file.
        ignored: first part of a name -> number of entries that are not the backbone's.
    """

    layout: Layout
    weights: Weights | None
    tensors: dict[str, Tensor]
    ignored: dict[str, int]


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Name without what torch's wrappers add to it -> the name with it.

    ``torch.compile`` adds ``_orig_mod.``, ``DistributedDataParallel`` a leading ``module.``. Names
    that would no longer differ are left as they are.
    """
    names = list(names)
    bare = {_bare_name(name): name for name in names}
    return bare if len(bare) == len(names) else {name: name for name in names}


def _bare_name(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    while len(parts) > 2 and parts[0] == "backbone" and parts[1] == "module":
        del parts[1]
    return ".".join(parts)


def _bare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {bare: tensors[name] for bare, name in bare_names(tensors).items()}


def nested_tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file by bare name: those in its ``state_dict`` if it has one, else its own.

    See `bare_names`.
    """
    nested = content.get("state_dict", content)
    nested = nested if isinstance(nested, Mapping) else {}
    named = {name: value for name, value in nested.items() if isinstance(name, str)}
    return _bare({name: value for name, value in named.items() if isinstance(value, Tensor)})


def find_entries(
    content: Mapping[str, Any], names: Iterable[str], *, weights: Weights, path: Path
) -> Entries:
    """Find the backbone's weights in a file's content.

    Args:
        content: what the file holds.
        names: the backbone's own state-dict names, bare.
        weights: which weights, in files that hold both.
        path: the file, for messages.

    Raises:
        ConfigError: there are no weights, or not those that were asked for.
    """
    training = {key: content[key] for key in ("model", "ema") if _is_state_dict(content.get(key))}
    if training:
        if weights not in training:
            raise _other_weights(path, weights, found=", ".join(training))
        others = [key for key in content if key != weights]
        return _entries("training file", weights, _bare(training[weights]), ignored=others)
    tensors = nested_tensors(content)
    if not tensors:
        raise ConfigError(
            f"checkpoint {path}: holds no weights under state_dict, model, ema or its own top "
            f"level; found the keys {sorted(map(str, content))[:10]}"
        )
    if any(name.startswith(_LDM_PREFIX) for name in tensors):
        return _latent_diffusion(tensors, set(names), weights=weights, path=path)
    if any(name.startswith(_LIGHTNING_PREFIX) for name in tensors):
        return _lightning(tensors, content, weights=weights, path=path)
    others = [n for n, v in content.items() if "state_dict" in content or not isinstance(v, Tensor)]
    return _entries("state dict", None, tensors, ignored=others)


def _is_state_dict(value: object) -> bool:
    """Whether this is a non-empty mapping of names to tensors."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(n, str) and isinstance(v, Tensor) for n, v in value.items())


def _entries(
    layout: Layout, weights: Weights | None, tensors: dict[str, Tensor], *, ignored: Iterable[str]
) -> Entries:
    """Count what is ignored by the first part of its name."""
    counts = Counter(str(name).split(".")[0] for name in ignored)
    return Entries(layout=layout, weights=weights, tensors=tensors, ignored=dict(counts))


def _other_weights(path: Path, asked: Weights, *, found: str) -> ConfigError:
    """The error for a file without the weights that were asked for."""
    return ConfigError(f"weights: {path} holds no {asked} weights, only {found}; found '{asked}'")


def _latent_diffusion(
    tensors: dict[str, Tensor], names: set[str], *, weights: Weights, path: Path
) -> Entries:
    """Take the UNet out of a latent-diffusion file.

    Its EMA is stored as buffers, whose names may hold no dot: ``input_blocks.0.0.weight`` is
    ``model_ema.diffusion_modelinput_blocks00weight``.
    """
    plain = {n.removeprefix(_LDM_PREFIX): n for n in tensors if n.startswith(_LDM_PREFIX)}
    chosen = plain
    if weights == "ema":
        averages = {n for n in tensors if n.startswith(_LDM_EMA_PREFIX)}
        averages -= {_LDM_EMA_PREFIX + "decay", _LDM_EMA_PREFIX + "num_updates"}
        if not averages:
            raise _other_weights(path, weights, found="model")
        ours = {_LDM_EMA_PREFIX + f"diffusion_model{n}".replace(".", ""): n for n in names}
        chosen = {ours.get(stored, stored): stored for stored in averages}
    ours_table, their_table = _CLASS_TABLE
    if ours_table in names and their_table in tensors:
        chosen[ours_table] = their_table
    used = set(chosen.values())
    return _entries(
        "latent-diffusion",
        weights,
        {name: tensors[stored] for name, stored in chosen.items()},
        ignored=[name for name in tensors if name not in used],
    )


def _lightning(
    tensors: dict[str, Tensor], content: Mapping[str, Any], *, weights: Weights, path: Path
) -> Entries:
    """Take the backbone out of this package's own checkpoints; averages are a callback's state."""
    prefix = _LIGHTNING_PREFIX
    chosen = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if weights == "ema":
        callbacks = content.get("callbacks")
        states = callbacks.values() if isinstance(callbacks, Mapping) else []
        averages = [s.get("averages") for s in states if isinstance(s, Mapping)]
        found = next((a for a in averages if _is_state_dict(a)), None)
        if found is None:
            raise _other_weights(path, weights, found="model")
        # Frozen entries have no average; they are in the live weights.
        chosen |= _bare(found)
    others = [name for name in tensors if not name.startswith(prefix)]
    return _entries("lightning", weights, chosen, ignored=others)
