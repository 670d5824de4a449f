"""Loading a first stage: a folder of diffusers, a single file, or a name on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.backbones.checkpoint_layouts import FIRST_STAGE_PREFIX, nested_tensors
from ant_lightning.backbones.official_checkpoints import read_checkpoint
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

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_MAX_LAYERS = 64
_MAX_SIZE = 2**20
# Attention layers in old versions of diffusers, and their names today.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_autoencoder(source: str, *, local_files_only: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The autoencoder of `source`, and the settings that its files hold.

    Args:
        source: A folder with `config.json` and weights; a file of diffusers (with `config.json`
            beside it) or of latent-diffusion (whose architecture is read off its shapes), in
            safetensors or as `torch.save` wrote it; or `owner/name` on the hub.
        local_files_only: Use only files that were downloaded before, without asking the hub.

    Raises:
        ConfigError: If there is no such source, it is damaged, or it would run code.
    """
    path = Path(source)
    if not path.exists():
        path = _downloaded(source, local_files_only=local_files_only)
    if path.is_dir():
        weights = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
        if weights is None or not (path / "config.json").is_file():
            raise FileError(
                f"{path}: must hold config.json and {_WEIGHTS[0]}, found "
                f"{sorted(each.name for each in path.iterdir())[:10]}"
            )
        path = weights
    tensors = nested_tensors(read_checkpoint(path))
    # A whole latent-diffusion model holds its first stage under a prefix.
    inside = {
        name.removeprefix(FIRST_STAGE_PREFIX): value
        for name, value in tensors.items()
        if name.startswith(FIRST_STAGE_PREFIX)
    }
    tensors = inside or tensors
    if is_latent_diffusion(list(tensors)):
        config = diffusers_config(tensors, path=str(path))
        tensors = diffusers_names(tensors)
    else:
        file = path.parent / "config.json"
        if not file.is_file():
            raise FileError(f"{path}: must have a config.json beside it, found none")
        config = read_json(file, kind=dict)
        check_config(config, file)
        tensors = {_modern(name): value for name, value in tensors.items()}
    return _built(config, tensors, path), config


def check_config(config: dict[str, Any], path: Path) -> None:
    """Refuse other classes, and absurd sizes, with which construction would take forever.

    Raises:
        FileError: Naming the file, the setting and its value.
    """
    name = config.get("_class_name")
    if name not in ("AutoencoderKL", "VQModel", "AutoencoderDC"):
        raise FileError(
            f"{path}: must be of an AutoencoderKL, a VQModel or an AutoencoderDC, found {name}"
        )
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        numbers = [each for each in values if isinstance(each, int)]
        if name in {"latents_mean", "latents_std"}:
            numbers = []
        most = _MAX_LAYERS if name.endswith("layers_per_block") else _MAX_SIZE
        if len(values) > _MAX_LAYERS or any(not 0 <= each <= most for each in numbers):
            raise FileError(f"{path}: {name} must be from 0 to {most}, found {str(value)[:80]}")


def _built(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """Make the network and fill all of it."""
    import diffusers  # noqa: PLC0415 - 5 s of imports that only first stages need

    make = getattr(diffusers, config["_class_name"]).from_config
    try:
        # First on the meta device: no memory is reserved for the sizes in the config before they
        # are found to agree with the weights in the file.
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in make(config).state_dict().items()}
    except Exception as error:  # whatever diffusers raises, the config caused it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileError(f"{path}: must have a config that diffusers takes: {reason}") from error
    found = {name: tensors[name].shape for name in shapes if name in tensors}
    different = [name for name in shapes if found.get(name) != shapes[name]]
    if different:
        # Prefer a wrong shape to a missing entry: it says more about the cause.
        name = min(different, key=lambda name: (name not in found, name))
        raise FileError(
            f"{path}: its weights do not fit its architecture: {name} must have shape "
            f"{list(shapes[name])}, found {list(found[name]) if name in found else 'nothing'}"
        )
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise FileError(f"{path}: its weights do not fit its architecture: it has no {unknown[0]}")
    if bad := not_finite({name: tensors[name] for name in shapes}):
        raise FileError(f"{path}: its weights must be finite, but {bad[0]} is not")
    autoencoder: nn.Module = make(config)
    autoencoder.load_state_dict(tensors)
    return autoencoder


def _downloaded(name: str, *, local_files_only: bool) -> Path:
    """Folder of the files of `owner/name` on the hub, in the local cache of downloads."""
    import huggingface_hub  # noqa: PLC0415 - comes with diffusers

    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ConfigError(f"source: no such file or folder, found {name}")
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=["config.json", *_WEIGHTS], local_files_only=local_files_only
        )
    except (OSError, ValueError) as error:
        # The hub's own errors, and those of the network under it, are kinds of these.
        raise ConfigError(
            "source: must be a local file or folder, or be available on the hub, found "
            f"{name} ({type(error).__name__}); download its folder elsewhere and give its path"
        ) from error
    return Path(folder)


def _modern(name: str) -> str:
    """The name that today's diffusers gives an entry."""
    parts = name.split(".")
    if "attentions" in parts:
        parts[-2] = _OLD_NAMES.get(parts[-2], parts[-2])
    return ".".join(parts)
