"""Writes a trained network as one file: the official layout, safetensors, or torch.export."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.backbones.checkpoint_layouts import bare_names
from ant_lightning.backbones.dit import DiT
from ant_lightning.backbones.unet import UNet
from ant_lightning.diffusion.discrete import DiscreteDiffusion
from ant_lightning.diffusion.flow import FlowMatching
from ant_lightning.errors import ConfigError
from ant_lightning.exports.official_notes import official_notes
from ant_lightning.files.atomic import write_atomically
from ant_lightning.files.safetensors_file import write_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from ant_lightning.models.denoiser import DiffusionModule
    from ant_lightning.models.module import MultiTaskDiffusion

EXPORTED_WEIGHTS = "model.safetensors"
_CLASS_TABLE = "class_embedder.embedding.weight"


def network_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network on the CPU, by names without what torch's wrappers add."""
    own = network.state_dict()
    return {bare: own[name].detach().cpu().clone() for bare, name in bare_names(own).items()}


def official_file(module: DiffusionModule) -> str:
    """Name of the file that `write_official` writes."""
    backbone = module.backbone
    latent = module.latent_space is not None or getattr(backbone, "context_dim", None) is not None
    return "model.ckpt" if isinstance(backbone, UNet) and latent else "model.pt"


def write_official(module: DiffusionModule, folder: Path) -> list[str]:
    """Write `model.pt` as the official repository reads it, or `model.ckpt` of latent diffusion.

    DiT, SiT, ADM and P2 read a bare state dict. Latent diffusion reads `state_dict` with the UNet
    below `model.diffusion_model.`, the class table below `cond_stage_model.` and the first stage
    below `first_stage_model.`; the first stage is left out, as its names there are others.

    Raises:
        ConfigError: If the official class cannot have these weights, or samples otherwise.
    """
    backbone, process = module.backbone, module.process
    weights = network_weights(backbone)
    is_sit = isinstance(process, FlowMatching) and process.convention == "sit"
    if not isinstance(process, DiscreteDiffusion) and not (is_sit and isinstance(backbone, DiT)):
        raise ConfigError(
            "process: must be DiscreteDiffusion, or FlowMatching with convention 'sit' and a DiT, "
            f"for an official repository to sample from it, found {type(process).__name__}"
        )
    is_latent_unet = official_file(module) != "model.pt"
    notes = official_notes(module, is_latent_unet=is_latent_unet)
    if isinstance(backbone, DiT):
        if backbone.routing is not None:
            raise ConfigError(
                "backbone.routing: must be None, as the official DiT has no masks of channels, "
                f"found {backbone.routing}"
            )
        if not backbone.num_classes:
            raise ConfigError(
                "backbone.num_classes: must be at least 1, as the official DiT always has a class "
                "table, found 0"
            )
        _save(folder / official_file(module), weights)
        return notes
    if not isinstance(backbone, UNet):
        raise ConfigError(
            f"backbone: must be a DiT or a UNet, found {type(backbone).__name__}, which has no "
            "official layout"
        )
    if not is_latent_unet:
        _save(folder / "model.pt", weights)
        return notes
    table = weights.pop(_CLASS_TABLE, None)
    state = {f"model.diffusion_model.{name}": value for name, value in weights.items()}
    if table is not None:
        state["cond_stage_model.embedding.weight"] = table
    _save(folder / official_file(module), {"state_dict": state})
    return [*notes, "latent diffusion's file has no first stage; its config names one"]


def write_safetensors(module: MultiTaskDiffusion, folder: Path) -> list[str]:
    """Write `model.safetensors`: the network's weights under its own names."""
    state = module.checkpoint_state().state_dict()
    about = {"trained_steps": module.trained_steps, "state": state}
    write_tensors(folder / EXPORTED_WEIGHTS, network_weights(module.backbone), about)
    return []


def write_program(module: DiffusionModule, folder: Path) -> list[str]:
    """Write `model.pt2`, a program of `torch.export` for any batch size.

    It is called as `program(x, timesteps)` or, with classes, `program(x, timesteps, labels)`, with
    what `process.network_inputs` gives.

    Raises:
        ConfigError: If torch cannot trace the network.
    """
    network = copy.deepcopy(module.backbone).cpu().eval().requires_grad_(False)
    network._compiled_call_impl = None  # a compiled network is traced as it was written
    batch = torch.export.Dim("batch", min=1, max=4096)
    dtype = next(network.parameters()).dtype
    x = torch.zeros(2, *module.image_shape, dtype=dtype)
    cells = torch.tensor([0, module.process.num_timesteps - 1])
    _, told = module.process.network_inputs(x, module.process.times(cells))
    inputs: tuple[Tensor, ...] = (x, told)
    if module.num_classes:
        inputs += (torch.zeros(2, dtype=torch.int64),)
    try:
        program = torch.export.export(
            network, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False
        )
    except Exception as error:  # torch raises errors of many kinds
        line = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"backbone: {type(network).__name__} must be a network that torch.export can trace, "
            f"found {type(error).__name__}: {line}"
        ) from error
    torch.export.save(program, folder / "model.pt2")
    return []


def _save(path: Path, content: Any) -> None:  # noqa: ANN401
    write_atomically(path, lambda file: torch.save(content, file))
