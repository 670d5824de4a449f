"""What an official repository must be told to sample from an exported file, or that it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.backbones.dit import DiT
from ant_lightning.diffusion.discrete import DiscreteDiffusion
from ant_lightning.diffusion.flow import FlowMatching
from ant_lightning.diffusion.schedules import CosineSchedule, LinearSchedule

if TYPE_CHECKING:
    from ant_lightning.models.denoiser import DiffusionModule

_SIT = {"eps": "noise", "score": "score"}
_SIT_PATHS = {"gvp": "GVP", "vp": "VP"}


def official_notes(module: DiffusionModule, *, is_latent_unet: bool) -> list[str]:
    """Settings of the official code that are not its default, in a line.

    Args:
        module: What is exported: a DiT, or a UNet.
        is_latent_unet: Whether latent diffusion reads it, and not ADM and P2.
    """
    process = module.process
    if isinstance(process, FlowMatching):
        return _of_sit(process)
    assert isinstance(process, DiscreteDiffusion)  # `write_official` says so
    is_dit = isinstance(module.backbone, DiT)
    code = "DiT" if is_dit else "latent diffusion" if is_latent_unet else "ADM and P2"
    predicted = process.prediction_type
    if predicted not in {"eps", "x0"}:
        return [_cannot(code, f"predicts {predicted}", "networks that predict eps or x0")]
    if not is_latent_unet:
        return _of_timesteps(process, code)
    told = "set parameterization: x0 in its config, and draw without DDIM, which takes eps alone"
    return [told] if predicted == "x0" else []


def _of_timesteps(process: DiscreteDiffusion, code: str) -> list[str]:
    """What DiT, ADM and P2 share: they come from one code."""
    count, is_dit = process.num_timesteps, code == "DiT"
    schedules = {"linear": LinearSchedule(count), "cosine": CosineSchedule(count)}
    betas = process.betas.cpu()
    name = next((n for n, each in schedules.items() if torch.allclose(each(), betas)), None)
    if name is None:
        return [_cannot(code, "has another noise schedule", "linear and cosine ones")]
    learned = process.variance_type == "learned_range"
    told = {
        "noise_schedule": ("'squaredcos_cap_v2'" if is_dit else name) if name == "cosine" else None,
        "diffusion_steps": count if count != 1000 else None,
        "predict_xstart": True if process.prediction_type == "x0" else None,
        "learn_sigma": learned if learned != is_dit else None,  # DiT's own default is True
        "sigma_small": True if is_dit and process.variance_type == "fixed_small" else None,
    }
    given = [(name, value) for name, value in told.items() if value is not None]
    if is_dit:
        said = ", ".join(f"{name}={value}" for name, value in given)
        return [f"in sample.py of DiT, call create_diffusion(..., {said})"] * bool(given)
    return [f"sample with {' '.join(f'--{n} {value}' for n, value in given)}"] * bool(given)


def _of_sit(process: FlowMatching) -> list[str]:
    predicted = process.prediction_type
    if predicted != "v" and predicted not in _SIT:
        return [
            _cannot("SiT", f"predicts {predicted}", "networks that predict v, eps or the score")
        ]
    told = [f"--path-type {_SIT_PATHS[process.path]}"] if process.path in _SIT_PATHS else []
    told += [f"--prediction {_SIT[predicted]}"] if predicted in _SIT else []
    return [f"sample with {' '.join(told)}"] if told else []


def _cannot(code: str, found: str, known: str) -> str:
    return (
        f"the official code of {code} cannot sample from this network, which {found}: it knows "
        f"{known}; load_run samples from the run, and export --to diffusers writes a pipeline"
    )
