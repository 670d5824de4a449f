"""The diffusion process, its losses and samplers."""

from ant_lightning.diffusion.guidance import GuidedDenoiser
from ant_lightning.diffusion.losses import DenoisingLoss, denoising_loss, variational_bound
from ant_lightning.diffusion.mixture import GaussianMixture
from ant_lightning.diffusion.process import DiscreteDiffusion, PMeanVariance
from ant_lightning.diffusion.samplers.base import Denoiser, Sampler, SampleStep
from ant_lightning.diffusion.samplers.ddim import DDIM, DDPM
from ant_lightning.diffusion.schedules import (
    CosineSchedule,
    LinearSchedule,
    NoiseSchedule,
    ScaledLinearSchedule,
    TableSchedule,
)
from ant_lightning.diffusion.weighting import P2, LossWeighting, MinSNR

__all__ = [
    "DDIM",
    "DDPM",
    "P2",
    "CosineSchedule",
    "Denoiser",
    "DenoisingLoss",
    "DiscreteDiffusion",
    "GaussianMixture",
    "GuidedDenoiser",
    "LinearSchedule",
    "LossWeighting",
    "MinSNR",
    "NoiseSchedule",
    "PMeanVariance",
    "SampleStep",
    "Sampler",
    "ScaledLinearSchedule",
    "TableSchedule",
    "denoising_loss",
    "variational_bound",
]
