"""Weights of the timesteps in the loss, as functions of the signal-to-noise ratio.

The squared errors of the three predictions are proportional: with the error e of x_start,
`|error of eps|² = snr |e|²` and `|error of v|² = (snr + 1) |e|²`. A weight on one is thus a
weight on the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from ant_lightning.diffusion.prediction import PredictionType, check_prediction_type
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["P2", "LossWeighting", "MinSNR"]


class LossWeighting(ABC):
    """Base of the weightings: calling one gives the weights of the mse, [T] in float64."""

    @abstractmethod
    def x0_weights(self, snr: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        """The weights on the squared error of x_start."""

    def __call__(
        self, snr: Float[Tensor, " T"], prediction_type: PredictionType
    ) -> Float[Tensor, " T"]:
        """Give the weights on the squared error of `prediction_type`.

        That is the x_start weight divided by snr (eps), by snr + 1 (v), or as it is (x0).

        Raises:
            ConfigError: an unknown prediction type, or an snr that is not positive.
        """
        check_prediction_type(prediction_type)
        snr = snr.to(torch.float64)
        if not bool((snr > 0).all()):
            raise ConfigError(f"snr must be positive, found {float(snr.min())}")
        weights = self.x0_weights(snr)
        if prediction_type == "eps":
            return weights / snr
        return weights if prediction_type == "x0" else weights / (snr + 1)


class MinSNR(LossWeighting):
    """Min-SNR-γ: `min(snr, γ)` on x_start, so `min(snr, γ) / snr` on eps, `/ (snr + 1)` on v.

    The official code wants another option for v, and gives it the eps weight without; here
    the prediction type decides.

    Reference: Hang et al., Efficient Diffusion Training via Min-SNR Weighting, arXiv 2303.09556.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise ConfigError(f"MinSNR: gamma must be positive, found {gamma}")
        self.gamma = gamma

    def x0_weights(self, snr: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        """The smaller of snr and γ."""
        return snr.clamp(max=self.gamma)


class P2(LossWeighting):
    """P2: `1 / (k + snr)^γ` on the eps loss, on which it is defined; γ = 0 is no weighting.

    The same objective needs `snr / (k + snr)^γ` on the x_start loss and
    `snr / ((snr + 1) (k + snr)^γ)` on the v loss.

    Reference: Choi et al., Perception Prioritized Training, arXiv 2204.00227, equation 8.
    """

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        if not gamma >= 0:
            raise ConfigError(f"P2: gamma must be at least 0, found {gamma}")
        if not k > 0:
            raise ConfigError(f"P2: k must be positive, found {k}")
        self.gamma = gamma
        self.k = k

    def x0_weights(self, snr: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        """`snr / (k + snr)^γ`."""
        return snr / (self.k + snr).pow(self.gamma)
