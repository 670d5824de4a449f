"""What decides the pixels of a drawn image beside its index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ant_lightning.balancing.shards import full_tensor
from ant_lightning.callbacks.ema import averaged_weights
from ant_lightning.files import tensors_digest

if TYPE_CHECKING:
    import lightning as L

    from ant_lightning.modules import MultiTaskDiffusion

__all__ = ["FORMAT", "sample_identity"]

FORMAT = 2  # 1 saw 64 numbers of each weight; a change of how images are drawn counts it up
_PLAIN = (bool, int, float, str)
_MAX_DEPTH = 4


def sample_identity(trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> dict[str, Any]:
    """Everything that the images of `predict` depend on, by name; every rank must ask together.

    Weights count with every byte, the network by its classes and their settings (two networks may
    have the same weights and other heads), the schedule to six digits, so that a processor that
    rounds otherwise goes on with the images of another.
    """
    backbone, process = pl_module.backbone, pl_module.process
    with averaged_weights(trainer, pl_module):
        # What is not in the state, such as tables of sines, follows from the settings; processors
        # round it differently.
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
        "guided_channels": pl_module.guided_channels,
        "clip_denoised": pl_module.clip_denoised,
        "seed": pl_module.seed,
        "num_classes": pl_module.num_classes,
        "null_class": pl_module.null_class,
        "image_shape": list(pl_module.image_shape),
        "first_stage": None if first_stage is None else first_stage.fingerprint,
        "prediction_type": process.prediction_type,
        "variance_type": process.variance_type,
        "schedule": _digest([f"{value:.6g}" for value in process.log_snr.tolist()]),
        "precision": str(trainer.precision),  # type: ignore[attr-defined]
    }


def _described(value: Any, depth: int = 0) -> Any:  # noqa: ANN401 - whatever a class keeps
    """A setting, or the class and the settings of an object, without addresses in memory."""
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [_described(each, depth) for each in value]
    if isinstance(value, torch.Tensor):
        return tensors_digest([value])
    if isinstance(value, Mapping):
        return {str(name): _described(each, depth) for name, each in value.items()}
    config = getattr(value, "config", None)  # where diffusers keeps settings, beside its tables
    settings: Mapping[Any, Any] = (
        config if isinstance(config, Mapping) else getattr(value, "__dict__", {})
    )
    if depth == _MAX_DEPTH:
        settings = {}
    if isinstance(value, nn.Module):  # its tensors and parts are looked at by themselves
        kept = (*_PLAIN, list, tuple)
        settings = {n: v for n, v in settings.items() if n != "training" and isinstance(v, kept)}
    public = {str(n): v for n, v in settings.items() if not str(n).startswith("_")}
    return {
        "class": _name(value),
        **{name: _described(each, depth + 1) for name, each in sorted(public.items())},
    }


def _name(value: object) -> str:
    """Of the class, or of a function; FSDP2 puts a class of its own in front."""
    if hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    kinds = type(value).__mro__
    return next(k.__qualname__ for k in kinds if not k.__module__.startswith("torch.distributed"))


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
