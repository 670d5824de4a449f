"""Weights of the timesteps in the loss, as functions of the signal-to-noise ratio.

The squared errors of the three predictions are proportional. If `x_start` has the error e, then
`|error of eps|² = snr |e|²` and `|error of v|² = (snr + 1) |e|²`. A weighting is therefore defined
once, on the error of `x_start`, and divided by that factor for eps and v.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from ant_lightning.diffusion.prediction import PredictionType, check_prediction_type
from ant_lightning.errors import ConfigError, check_above, check_at_least

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class LossWeighting(ABC):
    """Base of the weightings. A call returns the weights of the mse, `[T]` in float64.

    A subclass implements `x0_weights`.

    Examples:
        >>> import torch
        >>> from ant_lightning import LossWeighting
        >>> class SNRWeighting(LossWeighting):
        ...     def x0_weights(self, snr):
        ...         return snr
        >>> SNRWeighting()(torch.tensor([0.5, 4.0]), "eps").tolist()  # the simple loss of DDPM
        [1.0, 1.0]
    """

    @abstractmethod
    def x0_weights(self, snr: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        """The weights on the squared error of `x_start`."""

    def __call__(
        self, snr: Float[Tensor, " T"], prediction_type: PredictionType
    ) -> Float[Tensor, " T"]:
        """The weights on the squared error of `prediction_type`.

        The weight on `x_start`, divided by snr for eps, by snr + 1 for v, and by 1 for x0.

        Raises:
            ConfigError: If the prediction type is unknown, or an snr is not positive.
        """
        check_prediction_type(prediction_type)
        snr = snr.to(torch.float64)
        # A terminal SNR of zero has a weight for x0 and v, whose errors are those of x_start.
        if not bool(((snr > 0) if prediction_type == "eps" else (snr >= 0)).all()):
            raise ConfigError(f"snr: must be above 0, found {float(snr.min())}")
        weights = self.x0_weights(snr)
        return weights / {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[prediction_type]


class MinSNR(LossWeighting):
    """Min-SNR-γ: `min(snr, γ)` on x_start, so `min(snr, γ) / snr` on eps, `/ (snr + 1)` on v.

    The official code has a separate option for v; without it, v gets the weight of eps. Here the
    prediction type alone decides.

    Args:
        gamma: γ, above 0.

    Raises:
        ConfigError: If `gamma` is not above 0.

    Reference:
        Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy",
        arXiv 2303.09556.

    Examples:
        >>> import torch
        >>> from ant_lightning import MinSNR
        >>> MinSNR(gamma=5.0)(torch.tensor([0.5, 10.0]), "eps").tolist()
        [1.0, 0.5]
    """

    def __init__(self, gamma: float = 5.0) -> None:
        check_above(0, gamma=gamma)
        self.gamma = gamma

    def x0_weights(self, snr: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        """The smaller of snr and γ."""
        return snr.clamp(max=self.gamma)


class P2(LossWeighting):
    """P2: `1 / (k + snr)^γ` on the eps loss, for which it is defined; γ = 0 is no weighting.

    The same objective has `snr / (k + snr)^γ` on the x_start loss and
    `snr / ((snr + 1) (k + snr)^γ)` on the v loss.

    Args:
        gamma: γ, at least 0.
        k: k, above 0.

    Raises:
        ConfigError: If an argument is out of range.

    Reference:
        Choi et al., "Perception Prioritized Training of Diffusion Models", equation 8,
        arXiv 2204.00227.

    Examples:
        >>> import torch
        >>> from ant_lightning import P2
        >>> P2(gamma=1.0, k=1.0)(torch.tensor([1.0, 3.0]), "eps").tolist()
        [0.5, 0.25]
    """

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        check_at_least(0, gamma=gamma)
        check_above(0, k=k)
        self.gamma = gamma
        self.k = k

    def x0_weights(self, snr: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        """`snr / (k + snr)^γ`."""
        return snr / (self.k + snr).pow(self.gamma)
