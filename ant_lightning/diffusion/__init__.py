"""Noise processes, their losses and samplers."""

from ant_lightning.diffusion.density import Density, Table, Uniform
from ant_lightning.diffusion.density_normal import LogitNormal, LogNormal
from ant_lightning.diffusion.density_shifted import Mode, Shifted, SizeShifted
from ant_lightning.diffusion.discrete import DiscreteDiffusion
from ant_lightning.diffusion.edm import EDM
from ant_lightning.diffusion.flow import FlowMatching
from ant_lightning.diffusion.guidance import GuidedDenoiser
from ant_lightning.diffusion.losses import PMeanVariance, denoising_loss, variational_bound
from ant_lightning.diffusion.mixture import GaussianMixture
from ant_lightning.diffusion.preconditioning import (
    EDMPreconditioning,
    IDDPMPreconditioning,
    Preconditioning,
    VEPreconditioning,
    VPPreconditioning,
)
from ant_lightning.diffusion.process import DenoisingLoss, NoiseProcess
from ant_lightning.diffusion.proposals import CellProposal, LossSecondMoment, SpeeD
from ant_lightning.diffusion.samplers.base import Denoiser, Sampler, SampleStep
from ant_lightning.diffusion.samplers.ddim import DDIM, DDPM
from ant_lightning.diffusion.samplers.edm import EDMSampler
from ant_lightning.diffusion.samplers.likelihood import flow_log_likelihood
from ant_lightning.diffusion.samplers.ode import ODESampler
from ant_lightning.diffusion.samplers.sde import SDESampler
from ant_lightning.diffusion.schedules import (
    CosineSchedule,
    LinearSchedule,
    NoiseSchedule,
    ScaledLinearSchedule,
    TableSchedule,
    ZeroTerminalSNR,
)
from ant_lightning.diffusion.weighting import P2, LossWeighting, MinSNR

__all__ = [
    "DDIM",
    "DDPM",
    "EDM",
    "P2",
    "CellProposal",
    "CosineSchedule",
    "Denoiser",
    "DenoisingLoss",
    "Density",
    "DiscreteDiffusion",
    "EDMPreconditioning",
    "EDMSampler",
    "FlowMatching",
    "GaussianMixture",
    "GuidedDenoiser",
    "IDDPMPreconditioning",
    "LinearSchedule",
    "LogNormal",
    "LogitNormal",
    "LossSecondMoment",
    "LossWeighting",
    "MinSNR",
    "Mode",
    "NoiseProcess",
    "NoiseSchedule",
    "ODESampler",
    "PMeanVariance",
    "Preconditioning",
    "SDESampler",
    "SampleStep",
    "Sampler",
    "ScaledLinearSchedule",
    "Shifted",
    "SizeShifted",
    "SpeeD",
    "Table",
    "TableSchedule",
    "Uniform",
    "VEPreconditioning",
    "VPPreconditioning",
    "ZeroTerminalSNR",
    "denoising_loss",
    "flow_log_likelihood",
    "variational_bound",
]
