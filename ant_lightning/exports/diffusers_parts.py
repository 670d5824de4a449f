"""Writes a network of diffusers that was trained here as the parts of a pipeline."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from ant_lightning.backbones.checkpoint_layouts import bare_names
from ant_lightning.exports.adapter_files import save_adapter
from ant_lightning.exports.schedulers import scheduler_of
from ant_lightning.models.adapters import adapted

if TYPE_CHECKING:
    from pathlib import Path

    from ant_lightning.models.denoiser import DiffusionModule
    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["write_adapter", "write_parts"]


def write_adapter(module: MultiTaskDiffusion, folder: Path) -> list[str]:
    """Write the adapter alone, as `save_adapter` does; returns how it is read, a line each."""
    path = save_adapter(module, folder)
    if path.name == "adapter_model.safetensors":
        return ["the adapter alone: PeftModel.from_pretrained(network, FOLDER) reads it"]
    return ["the adapter alone: pipeline.load_lora_weights(FOLDER) reads it"]


def write_parts(module: DiffusionModule, folder: Path) -> list[str]:
    """Write network, scheduler and first stage, each as its class of diffusers stores itself.

    Returns:
        What else a pipeline needs, and what it does otherwise than the run, a line each.

    Raises:
        ConfigError: If the process has no scheduler.
    """
    network = copy.deepcopy(adapted(module.backbone)).cpu()
    # Compiled parts inside would change the names.
    names = bare_names(network.state_dict())
    assert list(names) == list(names.values())
    found = scheduler_of(module)
    part = "unet" if type(network).__name__.startswith("UNet") else "transformer"
    network.eval().save_pretrained(folder / part)  # type: ignore[operator]
    found.scheduler.save_pretrained(folder / "scheduler")
    if module.first_stage is not None:
        vae = copy.deepcopy(module.first_stage._autoencoder).cpu()
        vae.save_pretrained(folder / "vae")
    note = f"parts of a pipeline: pass {part} and scheduler to the pipeline of the base"
    return [note, *found.notes]
