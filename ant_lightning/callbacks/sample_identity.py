"""What determines the pixels of a generated image, besides its index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ant_lightning.balancing.local_parts import full_tensor
from ant_lightning.callbacks.ema import averaged_weights
from ant_lightning.files.identity import tensors_digest
from ant_lightning.models.state import process_summary

if TYPE_CHECKING:
    import lightning as L

    from ant_lightning.models.module import MultiTaskDiffusion

FORMAT = 2  # increase when images are drawn differently; format 1 hashed 64 numbers per weight
_PLAIN = (bool, int, float, str)
_MAX_DEPTH = 4  # of nested objects, which may refer to each other in a circle


def sample_identity(trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> dict[str, Any]:
    """Everything that the images of `predict` depend on, by name. Collective: call it on all ranks.

    Every byte of the weights counts. The network is identified by its classes and their settings as
    well, because networks with the same weights may differ in their number of heads. The schedule
    counts with six digits only, so that images can be continued on a processor that rounds
    differently.
    """
    backbone, process = pl_module.backbone, pl_module.process
    # Left out where it is what images of 0.1 were drawn with, so that these can be continued.
    summary = process_summary(process)
    known = None if summary == "DiscreteDiffusion" else summary
    with averaged_weights(trainer, pl_module):
        # Tensors outside the state dict, such as sine tables, follow from the settings, and their
        # rounding depends on the processor.
        state = backbone.state_dict().values()
        weights = tensors_digest(full_tensor(v) for v in state if isinstance(v, torch.Tensor))
    first_stage = pl_module.first_stage
    return {
        "format": FORMAT,
        "weights": weights,
        "model": _name(pl_module),
        "network": _digest([(name, _described(part)) for name, part in backbone.named_modules()]),
        "sampler": _described(pl_module.sampler),
        "guidance_scale": pl_module.guidance_scale,
        "guided_channels": pl_module.sampling.guided_channels,
        **_guidance(pl_module),
        "clip_denoised": pl_module.clip_denoised,
        # Left out where all classes take turns, as in earlier versions.
        **({} if pl_module.predict_classes is None else {"classes": pl_module.predict_classes}),
        "seed": pl_module.seed,
        "num_classes": pl_module.num_classes,
        "null_class": pl_module.null_class,
        "image_shape": list(pl_module.image_shape),
        "first_stage": None if first_stage is None else first_stage.fingerprint,
        "prediction_type": process.prediction_type,
        **({} if known is None else {"process": known}),
        "variance_type": process.identity().get("variance_type"),
        "schedule": _digest([f"{value:.6g}" for value in process.log_snr.tolist()]),
        "precision": str(trainer.precision),  # type: ignore[attr-defined]
    }


def _guidance(pl_module: MultiTaskDiffusion) -> dict[str, Any]:
    """Interval and second network, if they are used: without them an identity stays what it was."""
    found: dict[str, Any] = {}
    if pl_module.sampling.guidance_interval is not None:
        found["guidance_interval"] = list(pl_module.sampling.guidance_interval)
    if pl_module.guide is not None:
        found["guide"] = tensors_digest(pl_module.guide.state_dict().values())
    prompts = pl_module.conditions.prompts
    if prompts is not None:  # those of a few images tell one set of captions from another
        told = [*prompts(list(range(8))).values(), *pl_module.conditions.null_state().values()]
        found["conditions"] = tensors_digest(told)
    return found


def _described(value: Any, depth: int = 0) -> Any:  # noqa: ANN401 - whatever a class keeps
    """A setting as it is; an object as its class and settings, without memory addresses."""
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [_described(each, depth) for each in value]
    if isinstance(value, torch.Tensor):
        return tensors_digest([value])
    if isinstance(value, Mapping):
        return {str(name): _described(each, depth) for name, each in value.items()}
    config = getattr(value, "config", None)  # diffusers keeps settings here, apart from its tables
    settings: Mapping[Any, Any] = (
        config if isinstance(config, Mapping) else getattr(value, "__dict__", {})
    )
    if depth == _MAX_DEPTH:
        settings = {}
    if isinstance(value, nn.Module):  # its tensors and submodules are described separately
        kept = (*_PLAIN, list, tuple)
        settings = {n: v for n, v in settings.items() if n != "training" and isinstance(v, kept)}
    public = {str(n): v for n, v in settings.items() if not str(n).startswith("_")}
    return {
        "class": _name(value),
        **{name: _described(each, depth + 1) for name, each in sorted(public.items())},
    }


def _name(value: object) -> str:
    """Name of a function or of an object's class, without the class that FSDP2 puts in front."""
    if hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    kinds = type(value).__mro__
    return next(k.__qualname__ for k in kinds if not k.__module__.startswith("torch.distributed"))


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
