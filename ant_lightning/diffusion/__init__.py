"""The diffusion process, its losses and samplers."""

from ant_lightning.diffusion.guidance import GuidedDenoiser
from ant_lightning.diffusion.losses import DenoisingLoss, denoising_loss, variational_bound
from ant_lightning.diffusion.mixture import GaussianMixture
from ant_lightning.diffusion.prediction import PredictionType
from ant_lightning.diffusion.process import DiscreteDiffusion, PMeanVariance, VarianceType
from ant_lightning.diffusion.samplers.respacing import latent_ddim_timesteps, space_timesteps
from ant_lightning.diffusion.samplers.sampler import Denoiser, Sampler, SampleStep
from ant_lightning.diffusion.samplers.sampling import DDIM, DDPM
from ant_lightning.diffusion.samplers.steps import ancestral_step, ddim_inverse_step, ddim_step
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
    "PredictionType",
    "SampleStep",
    "Sampler",
    "ScaledLinearSchedule",
    "TableSchedule",
    "VarianceType",
    "ancestral_step",
    "ddim_inverse_step",
    "ddim_step",
    "denoising_loss",
    "latent_ddim_timesteps",
    "space_timesteps",
    "variational_bound",
]
