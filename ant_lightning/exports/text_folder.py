"""Writes a network that is told text as a pipeline of diffusers."""

from __future__ import annotations

import copy
import json
import shutil
from typing import TYPE_CHECKING, Any

from ant_lightning.backbones.checkpoint_layouts import bare_names
from ant_lightning.backbones.diffusers import MASK
from ant_lightning.exports.networks import code_of, copy_code, diffusers_network
from ant_lightning.exports.schedulers import scheduler_of
from ant_lightning.exports.text_pipeline import MASKED, TextPipeline, text_pipeline_of

if TYPE_CHECKING:
    from pathlib import Path

    from ant_lightning.exports.pipeline_source import PipelineSource
    from ant_lightning.models.denoiser import DiffusionModule


def write_text_network(
    module: DiffusionModule, folder: Path, source: PipelineSource | str
) -> list[str]:
    """Write the pipeline of a network that is told text, or its parts if there is no such pipeline.

    Args:
        module: Its backbone is a `DiffusersBackbone`, or several of intervals.
        folder: Where the files go.
        source: The pipeline whose text encoders and tokenizers are copied, or the reason why there
            is none: the pipeline then draws from embeddings.

    Returns:
        What the pipeline does otherwise than the run, a line each.

    Raises:
        ConfigError: If the process has no scheduler.
    """
    network: Any = diffusers_network(module.backbone)
    # Compiled parts inside would change the names.
    names = bare_names(network.state_dict())
    assert list(names) == list(names.values())
    class_name = network.config.get("class_name", type(network).__name__)
    part = "unet" if class_name.startswith("UNet") else "transformer"
    network.save_pretrained(folder / part)
    code = code_of(network)
    if code is not None:
        copy_code(code, folder / part)
    found = text_pipeline_of(module)
    scheduling = scheduler_of(module) if isinstance(found, str) else found.scheduling
    scheduling.scheduler.save_pretrained(folder / "scheduler")
    if module.first_stage is not None:
        vae = copy.deepcopy(module.first_stage._autoencoder).cpu()
        if not isinstance(found, str):
            assert module.latent_space is not None  # as `text_pipeline_of` says
            scale, shift = module.latent_space.scale, module.latent_space.shift
            vae.register_to_config(scaling_factor=scale)
            if module.latent_space.kind == "kl":
                vae.register_to_config(shift_factor=shift)
        vae.save_pretrained(folder / "vae")
    if isinstance(found, str):
        note = f"parts of a pipeline, {part} and scheduler, for that of the base: {found}"
        return [note, *scheduling.notes]
    own = {part: network, "scheduler": scheduling.scheduler, "vae": vae}
    index = {name: ["diffusers", type(value).__name__] for name, value in own.items()}
    index[part][0] = code or "diffusers"
    _write_index(found, folder, index, source)
    if isinstance(source, str):
        return [f"without text encoders, to draw from prompt_embeds: {source}", *found.notes]
    if found.class_name not in MASKED:
        return found.notes
    told = [f"{found.class_name} takes prompts in small letters"]
    if MASK not in module.conditions.names:
        told.append(f"{found.class_name} tells the network which tokens of a prompt are padding")
    return [*told, *found.notes]


def _write_index(
    found: TextPipeline,
    folder: Path,
    own: dict[str, list[str]],
    source: PipelineSource | str,
) -> None:
    """Write `model_index.json`, and copy what is not our own."""
    import diffusers  # noqa: PLC0415 - 5 s of imports

    kind = getattr(diffusers, found.class_name)
    expected, settings = kind._get_signature_keys(kind)
    listed: dict[str, Any] = {name: [None, None] for name in sorted(expected)}
    if "requires_safety_checker" in settings:
        listed["requires_safety_checker"] = False
    if not isinstance(source, str):
        theirs = source.listed
        listed |= {name: theirs[name] for name in {*expected, *settings} & theirs.keys()}
        for name in sorted(expected - own.keys()):
            if listed[name][0] is not None:
                shutil.copytree(source.folder / name, folder / name)
    if "force_zeros_for_empty_prompt" in settings:
        listed["force_zeros_for_empty_prompt"] = False  # the null is the embedding of no text
    about = {"_class_name": found.class_name, "_diffusers_version": diffusers.__version__}
    (folder / "model_index.json").write_text(json.dumps(about | listed | own, indent=2) + "\n")
