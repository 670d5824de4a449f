"""A trained adapter as files that diffusers or PEFT read."""

from __future__ import annotations

import inspect
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from ant_lightning.errors import ConfigError
from ant_lightning.files.safetensors_file import write_tensors
from ant_lightning.models.adapters import NAME, adapted

if TYPE_CHECKING:
    from ant_lightning.models.module import MultiTaskDiffusion

# Pipelines that load LoRA into a network of each class, and the part that the network is.
_PIPELINES = {
    "UNet2DConditionModel": ("StableDiffusionPipeline", "unet"),
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline", "transformer"),
    "FluxTransformer2DModel": ("FluxPipeline", "transformer"),
    "SanaTransformer2DModel": ("SanaPipeline", "transformer"),
}


def save_adapter(
    module: MultiTaskDiffusion,
    folder: str | Path,
    *,
    to: Literal["auto", "diffusers", "peft"] = "auto",
) -> Path:
    """Write the adapter of a module, with the weights that it has now.

    `diffusers`: `pytorch_lora_weights.safetensors` with the adapter's settings in its metadata, for
    `pipeline.load_lora_weights(folder)`; without these settings a pipeline takes `alpha = r` and
    draws other images. `peft`: `adapter_config.json` and `adapter_model.safetensors`, for
    `PeftModel.from_pretrained(network, folder)`.

    Args:
        module: With an adapter; `load_run` gives the averaged weights.
        folder: Where the files go.
        to: The format; `auto` is diffusers' for LoRA in the networks of SD, SD3, Flux and Sana,
            whose pipelines load it, and PEFT's for all others.

    Returns:
        The file with the weights.

    Raises:
        ConfigError: If the module has no adapter, or no pipeline loads it.

    Examples:
        `save_adapter(load_run("runs/sd3_lora/version_0"), "my_lora")`, and then, in diffusers,
        `pipeline.load_lora_weights("my_lora")`.

        >>> from ant_lightning import save_adapter
        >>> save_adapter.__kwdefaults__["to"]
        'auto'
    """
    if module.adapter is None:
        raise ConfigError("adapter: must be set for a run whose adapter is saved, found None")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=folder) as made:
        name = _write(module, Path(made), to)
        for file in sorted(Path(made).iterdir()):  # the settings before the weights
            file.replace(folder / file.name)
    return folder / name


def _write(module: MultiTaskDiffusion, folder: Path, to: str) -> str:
    """Write the files into an empty folder; returns the name of that with the weights."""
    from peft import get_peft_model_state_dict  # noqa: PLC0415 - an extra

    network: Any = adapted(module.backbone)
    config = network.peft_config[NAME]
    name = next((k.__name__ for k in type(network).__mro__ if k.__name__ in _PIPELINES), None)
    loads = name is not None and config.peft_type == "LORA" and not config.use_dora
    if to == "diffusers" and not loads:
        raise ConfigError(
            f"to: must be peft for {type(network).__name__} with {module.adapter}, as no pipeline "
            "loads it, found diffusers"
        )
    state = get_peft_model_state_dict(network, adapter_name=NAME)
    if not loads or to == "peft":
        named = {f"base_model.model.{key}": each for key, each in state.items()}
        write_tensors(folder / "adapter_model.safetensors", named, {})
        config.save_pretrained(folder)
        return "adapter_model.safetensors"
    import diffusers  # noqa: PLC0415 - seconds of imports
    from diffusers.utils import convert_state_dict_to_diffusers  # noqa: PLC0415

    assert name is not None
    kind, part = _PIPELINES[name]
    if network.config.get("addition_embed_type") == "text_time":
        kind = "StableDiffusionXLPipeline"
    save = getattr(diffusers, kind).save_lora_weights
    key = f"{part}_lora_adapter_metadata"
    if key not in inspect.signature(save).parameters:
        raise ConfigError(f"to: diffusers must be 0.35 or newer to write {key}, found an older one")
    if part == "unet":
        state = convert_state_dict_to_diffusers(state)
    save(folder, **{f"{part}_lora_layers": state, key: config.to_dict()})
    return "pytorch_lora_weights.safetensors"


def write_adapter(module: MultiTaskDiffusion, folder: Path) -> list[str]:
    """Write the adapter alone, as `save_adapter` does; returns how it is read, a line each."""
    path = save_adapter(module, folder)
    if path.name == "adapter_model.safetensors":
        return ["the adapter alone: PeftModel.from_pretrained(network, FOLDER) reads it"]
    return ["the adapter alone: pipeline.load_lora_weights(FOLDER) reads it"]
