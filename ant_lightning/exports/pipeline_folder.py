"""Writes a trained model as a pipeline folder of diffusers."""

from __future__ import annotations

import copy
import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ant_lightning.diffusion.discrete import DiscreteDiffusion
from ant_lightning.diffusion.flow import FlowMatching
from ant_lightning.errors import ConfigError
from ant_lightning.exports.adapter_files import write_adapter
from ant_lightning.exports.networks import (
    check_experts,
    code_of,
    copy_code,
    diffusers_network,
)
from ant_lightning.exports.schedulers import Scheduling, scheduler_of
from ant_lightning.exports.stock import Stock, stock_of
from ant_lightning.exports.text_folder import write_text_network
from ant_lightning.exports.text_pipeline import is_told_text
from ant_lightning.transfer.experts import IntervalExperts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from ant_lightning.diffusion.process import NoiseProcess
    from ant_lightning.exports.pipeline_source import PipelineSource
    from ant_lightning.models.denoiser import DiffusionModule


class _Pair(NamedTuple):
    """Two networks of intervals, as diffusers' pipelines with two transformers have them."""

    high: nn.Module
    low: nn.Module
    boundary_ratio: float


def _pair(backbone: nn.Module, process: NoiseProcess) -> _Pair | None:
    """The networks above and below one border; `None` if these are not two, or under EDM."""
    if not isinstance(backbone, IntervalExperts) or backbone.served_by != [0, 1]:
        return None
    check_experts(backbone)
    (border,) = backbone.borders
    if isinstance(process, DiscreteDiffusion):
        ratio = border / process.num_timesteps
    elif isinstance(process, FlowMatching):
        ratio = border / 1000 if backbone.rising else 1 - border  # of diffusers, of SiT
    else:
        return None
    low, high = backbone.networks
    return _Pair(high, low, ratio)


def write_pipeline(
    module: DiffusionModule,
    folder: Path,
    *,
    source: PipelineSource | str = "none was looked for",
    class_names: Sequence[str] = (),
) -> list[str]:
    """Write the pipeline of a module into an empty folder.

    Where a class of diffusers samples as the run does (`stock_of`), the pipeline is of that class;
    else it is an `ANTPipeline`, whose code lies in the folder. Two networks of intervals become two
    parts, more of them one. A network of diffusers that is told
    text leaves as `write_text_network` says, an adapter alone.

    Args:
        module: The trained model.
        folder: Where the files go.
        source: The pipeline whose text encoders are copied, or why there is none.
        class_names: Names of the classes, in the order of their numbers, if they are known.

    Returns:
        What the pipeline does otherwise than the run, a line each.

    Raises:
        ConfigError: If the network, the process or the first stage has no equivalent.
    """
    backbone, space = module.backbone, module.latent_space
    if getattr(module, "adapter", None) is not None:
        return write_adapter(module, folder)  # type: ignore[arg-type]
    if is_told_text(backbone):
        return write_text_network(module, folder, source)
    found = scheduler_of(module)
    if space is not None and module.first_stage is None:
        raise ConfigError(
            "first_stage: needed to decode the cached latents that the run was trained on, found "
            f"None; give the folder of {space.source}"
        )
    pair = _pair(backbone, module.process)
    network = diffusers_network(backbone if pair is None else pair.high)
    class_name = network.config.get("class_name", type(network).__name__)
    name = "unet" if class_name.startswith("UNet") else "transformer"
    kind = code_of(network)
    parts: dict[str, tuple[Any, str | None]] = {
        name: (network, kind),
        "scheduler": (found.scheduler, None),
    }
    if pair is not None:
        parts[f"{name}_2"] = (diffusers_network(pair.low), kind)
    stock = stock_of(module)
    if module.first_stage is not None:
        vae = copy.deepcopy(module.first_stage._autoencoder).cpu()
        vae.register_to_config(scaling_factor=module.first_stage.space.scale)
        parts["vae" if stock is None else stock.first_stage] = (vae, None)
    if getattr(backbone, "class_embedder", None) is not None:
        table = backbone.class_embedder["embedding"]  # type: ignore[index]
        made = import_module("ant_lightning.exports.class_table").ClassTable(
            table.num_embeddings, table.embedding_dim
        )
        made.embedding.load_state_dict({"weight": table.weight})
        parts["class_table"] = (made, "class_table")
    index = _index(module, found, stock, parts)
    if class_names and (stock is None or stock.class_name == "DiTPipeline"):
        index["id2label"] = {str(i): name for i, name in enumerate(class_names)}
    if pair is not None:
        index["boundary_ratio"] = pair.boundary_ratio
    for part, (value, code) in parts.items():
        value.save_pretrained(folder / part)
        if code is not None:
            copy_code(code, folder / part)
    if isinstance(index["_class_name"], list):
        copy_code("ant_pipeline", folder)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return found.notes


def _index(
    module: DiffusionModule,
    found: Scheduling,
    stock: Stock | None,
    parts: dict[str, tuple[Any, str | None]],
) -> dict[str, Any]:
    """The content of `model_index.json`."""
    import diffusers  # noqa: PLC0415

    listed: dict[str, Any] = {
        name: [code or "diffusers", type(value).__name__] for name, (value, code) in parts.items()
    }
    version = {"_diffusers_version": diffusers.__version__}
    if stock is not None:
        return {"_class_name": stock.class_name, **version, **listed}
    for name in ("unet", "unet_2", "transformer", "transformer_2", "vae", "class_table"):
        listed.setdefault(name, [None, None])
    space = module.latent_space
    return {
        "_class_name": ["ant_pipeline", "ANTPipeline"],
        **version,
        **listed,
        "process": found.process,
        "num_classes": module.num_classes,
        "null_class": module.null_class,
        "guidance_scale": module.guidance_scale if module.null_class is not None else 1.0,
        "guided_channels": module.sampling.guided_channels,
        "num_inference_steps": found.num_steps,
        "eta": found.eta,
        "clip_sample": module.clip_denoised,
        "latent_shape": list(module.image_shape),
        "latent_scale": 1.0 if space is None else space.scale,
        "latent_shift": 0.0 if space is None else space.shift,
    }
