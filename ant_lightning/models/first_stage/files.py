"""Loading a first stage: a folder of diffusers, a single file, or a name on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.backbones.checkpoint_layouts import FIRST_STAGE_PREFIX, nested_tensors
from ant_lightning.backbones.checkpoints import read_checkpoint
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.json_file import read_json
from ant_lightning.files.torch_file import not_finite
from ant_lightning.models.first_stage.names import (
    diffusers_config,
    diffusers_names,
    is_latent_diffusion,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["load_autoencoder"]

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_MAX_LAYERS = 64
_MAX_SIZE = 2**20
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_autoencoder(source: str, *, local_files_only: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The autoencoder of `source`, and the settings that its files hold.

    Args:
        source: A folder with `config.json` and weights; a file of diffusers (with `config.json`
            beside it) or of latent-diffusion (whose architecture is read off its shapes), in
            safetensors or as `torch.save` wrote it; or `owner/name` on the hub.
        local_files_only: Whether the hub is not asked, and only files that were downloaded before
            are used.

    Raises:
        ConfigError: If there is no such source, it is damaged, or it would run code.
    """
    path = Path(source)
    if path.is_dir():
        weights = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
        if weights is None or not (path / "config.json").is_file():
            raise ConfigError(
                f"first_stage.source: the folder {path} must hold config.json and {_WEIGHTS[0]}, "
                f"found {sorted(each.name for each in path.iterdir())[:10]}"
            )
        return _from_file(weights)
    if path.is_file():
        return _from_file(path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise ConfigError(f"first_stage.source: no such file or folder, found {source}")
    return _from_hub(source, local_files_only=local_files_only)


def _from_file(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A folder's weights, or a single file."""
    tensors = nested_tensors(read_checkpoint(path))
    if any(name.startswith(FIRST_STAGE_PREFIX) for name in tensors):
        tensors = {
            name.removeprefix(FIRST_STAGE_PREFIX): value
            for name, value in tensors.items()
            if name.startswith(FIRST_STAGE_PREFIX)
        }
    if is_latent_diffusion(list(tensors)):
        config = diffusers_config(tensors, path=str(path))
        tensors = diffusers_names(tensors)
    else:
        config = _read_config(path.parent / "config.json", path)
        tensors = {_modern(name): value for name, value in tensors.items()}
    return _build(config, tensors, path), config


def _build(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """Make the network and fill all of it."""
    import diffusers  # noqa: PLC0415 - 5 s of imports that only first stages need

    name = config.get("_class_name")
    if name not in {"AutoencoderKL", "VQModel"}:
        raise ConfigError(
            f"first_stage.source: must be an AutoencoderKL or a VQModel, found {name} in {path}"
        )
    _check_numbers(config, path)
    make = getattr(diffusers, name).from_config
    try:
        # On no device first: what a config says is compared with the weights that are there
        # before memory is reserved for it.
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in make(config).state_dict().items()}
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, ArithmeticError) as error:
        raise FileError(f"first_stage.source: {path} has a bad config ({error})") from error
    unlike = sorted(n for n, s in shapes.items() if n in tensors and tensors[n].shape != s)
    if set(shapes) - set(tensors) or unlike:
        first = next(iter([*unlike, *sorted(set(shapes) - set(tensors))]))
        raise FileError(
            f"first_stage.source: the weights of {path} do not fit its architecture: {first} must "
            f"have shape {list(shapes[first])}, found "
            f"{list(tensors[first].shape) if first in tensors else 'nothing'}"
        )
    if bad := not_finite({name: tensors[name] for name in shapes}):
        raise FileError(
            f"first_stage.source: the weights of {path} must be finite, but {bad[0]} has a NaN or "
            "an infinity"
        )
    autoencoder: nn.Module = make(config)
    try:
        autoencoder.load_state_dict(tensors)
    except RuntimeError as error:
        raise ConfigError(
            f"first_stage.source: the weights of {path} do not fit its architecture: {error}"
        ) from error
    return autoencoder


def _check_numbers(config: dict[str, Any], path: Path) -> None:
    """Refuse sizes that no autoencoder has, which would take forever to build."""
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        numbers = [each for each in values if isinstance(each, int)]
        most = _MAX_LAYERS if name == "layers_per_block" else _MAX_SIZE
        if len(values) > _MAX_LAYERS or any(not 0 <= each <= most for each in numbers):
            raise FileError(
                f"first_stage.source: {name} in the config of {path} must be from 0 to {most}, "
                f"found {str(value)[:80]}"
            )


def _read_config(config: Path, weights: Path) -> dict[str, Any]:
    """The `config.json` beside a file of weights."""
    try:
        return read_json(config, kind=dict)
    except FileError as error:
        raise FileError(f"{weights}: needs a config.json beside it; {error}") from error


def _from_hub(name: str, *, local_files_only: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Download, or take from the local cache of downloads."""
    import huggingface_hub  # noqa: PLC0415 - comes with diffusers

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            allow_patterns=["config.json", *_WEIGHTS],
            local_files_only=local_files_only,
        )
    except (OSError, ValueError) as error:
        # The hub's own errors, and those of the network under it, are kinds of these.
        raise ConfigError(
            f"first_stage.source: neither a local file or folder, nor available on the hub, found "
            f"{name} ({type(error).__name__}); download its folder elsewhere and give its path"
        ) from error
    return load_autoencoder(folder, local_files_only=True)


def _modern(name: str) -> str:
    """Attention layers had other names in old versions of diffusers."""
    parts = name.split(".")
    if "attentions" in parts:
        parts[-2] = _OLD_NAMES.get(parts[-2], parts[-2])
    return ".".join(parts)
