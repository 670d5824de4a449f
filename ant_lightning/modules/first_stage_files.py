"""Loading a first stage: a folder of diffusers, a single file, or a name on the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant_lightning.backbones.checkpoint_files import read_checkpoint
from ant_lightning.backbones.checkpoint_layouts import FIRST_STAGE_PREFIX, nested_tensors
from ant_lightning.errors import ConfigError
from ant_lightning.modules.first_stage_names import (
    diffusers_config,
    diffusers_names,
    is_latent_diffusion,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["load_autoencoder"]

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
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
    try:
        autoencoder: nn.Module = getattr(diffusers, name).from_config(config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"first_stage.source: {path} has a bad config ({error})") from error
    try:
        autoencoder.load_state_dict(tensors)
    except RuntimeError as error:
        raise ConfigError(
            f"first_stage.source: the weights of {path} do not fit its architecture: {error}"
        ) from error
    return autoencoder


def _read_config(config: Path, weights: Path) -> dict[str, Any]:
    """The `config.json` beside a file of weights."""
    try:
        content = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"first_stage.source: {weights} needs a readable {config.name} beside it ({error})"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"first_stage.source: {config} must hold an object")
    return content


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
