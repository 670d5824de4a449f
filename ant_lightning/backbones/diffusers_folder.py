"""Reads a network's folder of diffusers, or that of its pipeline, for one of our networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant_lightning.backbones.diffusers_layouts import diffusers_layout
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.json_file import read_json
from ant_lightning.files.safetensors_file import read_safetensors
from ant_lightning.files.torch_file import read_torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from ant_lightning.backbones.diffusers_weights import DiffusersLayout

FOLDER_CONFIG = "diffusers_config"  # the entry of `read_folder` with the network's config
_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Older files name the class of DiT, and ours is a class of the export's own.
_SAME = {"Transformer2DModel": "DiTTransformer2DModel", "ExactDiT": "DiTTransformer2DModel"}
# What shapes may not tell, and what changes the output.
_COMPARED = (
    "num_attention_heads",
    "attention_head_dim",
    "patch_size",
    "in_channels",
    "out_channels",
    "num_layers",
    "layers_per_block",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "norm_num_groups",
    "flip_sin_to_cos",
    "freq_shift",
    "resnet_time_scale_shift",
    "attn_norm_num_groups",
    "cross_attention_dim",
    "transformer_layers_per_block",
)


def read_folder(path: Path) -> dict[str, Any]:
    """The config, the weights and the class table of a folder, as the content of a checkpoint.

    Raises:
        FileError: If it holds no network, or a file is damaged or would run code.
    """
    parts = [path / part for part in ("transformer", "unet", "")]
    second = next((part for part in parts[:2] if part.with_name(f"{part.name}_2").is_dir()), None)
    if second is not None:
        raise FileError(f"{path}: must hold one network, found {second.name} and {second.name}_2")
    folder = next((part for part in parts if (part / "config.json").is_file()), None)
    if folder is None:
        raise FileError(f"{path}: must be a folder of diffusers, found no config.json in it")
    config = read_json(folder / "config.json", kind=dict)
    content: dict[str, Any] = {FOLDER_CONFIG: config, "state_dict": _weights(folder)}
    table = path / "class_table"
    if (table / "config.json").is_file():
        content["state_dict"]["class_table.weight"] = _weights(table)["embedding.weight"]
    return content


def _weights(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{_NAMES[0]}.index.json"
    if index.is_file():
        places = read_json(index, kind=dict).get("weight_map")
        if not isinstance(places, dict) or not all(
            isinstance(each, str) and Path(each).name == each for each in places.values()
        ):
            raise FileError(f"{index}: must name the file of each weight, found {str(places)[:80]}")
        tensors: dict[str, Tensor] = {}
        for name in sorted(set(places.values())):
            tensors |= read_safetensors(folder / name)[0]
        return tensors
    for name in _NAMES:
        file = folder / name
        if file.is_file():
            return read_safetensors(file)[0] if file.suffix == ".safetensors" else _pickled(file)
    raise FileError(f"{folder}: must hold {_NAMES[0]}, found no such file")


def _pickled(file: Path) -> dict[str, Tensor]:
    content = read_torch(file)
    if not isinstance(content, dict):
        raise FileError(f"{file}: must hold a dictionary, found {type(content).__name__}")
    return content


def diffusers_weights(
    network: nn.Module,
    content: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
) -> dict[str, Tensor]:
    """The weights of `read_folder` under our names.

    Raises:
        ConfigError: If the folder's network is another than the one that ours would be exported as.
    """
    layout, config = diffusers_layout(network), content[FOLDER_CONFIG]
    _check_same(layout, config, path)
    weights = content["state_dict"]
    found = layout.from_diffusers(weights, shapes)
    if "class_table.weight" in weights:
        found["class_embedder.embedding.weight"] = weights["class_table.weight"]
    if "pos_embed" in shapes:  # a constant, which diffusers does not store
        found["pos_embed"] = network.get_parameter("pos_embed")
    return found


def _check_same(layout: DiffusersLayout, config: Mapping[str, Any], path: Path) -> None:
    kind = str(config.get("_class_name"))
    ours = {"_class_name": layout.class_name, **{n: layout.config.get(n) for n in _COMPARED}}
    theirs = {**config, "_class_name": _SAME.get(kind, kind)}
    if config.get("routing") is not None:  # weights that were trained without may go on with it
        ours["routing"] = layout.config.get("routing") or "None"
    for name, value in ours.items():
        found = theirs.get(name, value)
        if _plain(found) != _plain(value) and value is not None:
            raise ConfigError(f"{path}: must have {name} {value} as the backbone, found {found}")


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
