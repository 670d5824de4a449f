"""Preconditioning of EDM: how a network is made into an estimate of the clean image."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from ant_lightning.errors import ConfigError, check_at_least, check_between, check_positive

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Preconditioning(ABC):
    """`D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)`, which estimates the clean image.

    All coefficients are functions of sigma `[b]` in float64.

    Reference:
        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", table 1,
        arXiv 2206.00364.

    Examples:
        >>> import torch
        >>> from ant_lightning import VEPreconditioning
        >>> VEPreconditioning().c_noise(torch.tensor([2.0])).item()  # ln(sigma / 2)
        0.0
    """

    #: Noise levels between which networks of this kind are trained.
    sigma_range: tuple[float, float] = (0.002, 80.0)
    #: Whether the network may have twice the channels, of which the second half is dropped.
    doubles_output: bool = False

    @abstractmethod
    def c_skip(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Factor of the noisy image."""

    @abstractmethod
    def c_out(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Factor of the network's output; never 0."""

    @abstractmethod
    def c_in(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Factor of the network's input."""

    @abstractmethod
    def c_noise(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The network's time input."""

    @abstractmethod
    def target(self, sigma: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Factors of `x_start` and of the noise in what F should be, `(y - c_skip x) / c_out`."""


class EDMPreconditioning(Preconditioning):
    """Input and target of unit variance at every noise level, for data of variance `sigma_data²`.

    `c_skip = sd² / (sigma² + sd²)`, `c_out = sigma sd / sqrt(sigma² + sd²)`,
    `c_in = 1 / sqrt(sigma² + sd²)`, `c_noise = ln(sigma) / 4`.

    Args:
        sigma_data: Standard deviation of the data, sd.

    Raises:
        ConfigError: If `sigma_data` is not above 0.

    Examples:
        >>> import torch
        >>> from ant_lightning import EDMPreconditioning
        >>> EDMPreconditioning(sigma_data=0.5).c_skip(torch.tensor([0.5])).item()
        0.5
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        check_positive(sigma_data=sigma_data)
        self.sigma_data = sigma_data

    def _norm(self, sigma: Tensor) -> Tensor:
        return (sigma.square() + self.sigma_data**2).sqrt()

    def c_skip(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`sd² / (sigma² + sd²)`."""
        return self.sigma_data**2 / (sigma.square() + self.sigma_data**2)

    def c_out(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`sigma sd / sqrt(sigma² + sd²)`."""
        return sigma * self.sigma_data / self._norm(sigma)

    def c_in(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`1 / sqrt(sigma² + sd²)`."""
        return 1 / self._norm(sigma)

    def c_noise(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`ln(sigma) / 4`."""
        return sigma.log() / 4

    def target(self, sigma: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """`sigma / (sd sqrt(..))` and `-sd / sqrt(..)`: no difference of nearly equal numbers."""
        norm = self._norm(sigma)
        return sigma / (self.sigma_data * norm), -self.sigma_data / norm


class _PredictsNoise(Preconditioning):
    """`c_skip = 1`, `c_out = -sigma`: F is the noise."""

    def c_skip(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """1."""
        return torch.ones_like(sigma)

    def c_out(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`-sigma`."""
        return -sigma

    def c_in(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`1 / sqrt(sigma² + 1)`."""
        return 1 / (sigma.square() + 1).sqrt()

    def target(self, sigma: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """0 and 1."""
        return torch.zeros_like(sigma), torch.ones_like(sigma)


class VPPreconditioning(_PredictsNoise):
    """The variance-preserving networks of Song et al.: F is the noise.

    `c_noise = (num_levels - 1) t` with `sigma(t) = sqrt(exp(beta_d t² / 2 + beta_min t) - 1)`.

    Args:
        beta_d: Range of the continuous beta.
        beta_min: Its start.
        num_levels: Noise levels that the network was trained with, M.
        epsilon_t: Smallest t.

    Raises:
        ConfigError: If a number is out of range.

    Examples:
        >>> import torch
        >>> from ant_lightning import VPPreconditioning
        >>> [round(sigma, 4) for sigma in VPPreconditioning().sigma_range]
        [0.001, 152.167]
    """

    def __init__(
        self,
        *,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        num_levels: int = 1000,
        epsilon_t: float = 1e-5,
    ) -> None:
        check_at_least(2, num_levels=num_levels)
        check_positive(beta_d=beta_d, beta_min=beta_min, epsilon_t=epsilon_t)
        self.beta_d = beta_d
        self.beta_min = beta_min
        self.num_levels = num_levels
        self.sigma_range = (self.sigma(epsilon_t), self.sigma(1.0))

    def sigma(self, t: float) -> float:
        """The noise level at t."""
        return math.sqrt(math.expm1(self.beta_d * t**2 / 2 + self.beta_min * t))

    def t(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The inverse of `sigma`."""
        exponent = torch.log1p(sigma.square())
        root = (self.beta_min**2 + 2 * self.beta_d * exponent).sqrt()
        # (root - beta_min) / beta_d, without the difference of nearly equal numbers.
        return 2 * exponent / (root + self.beta_min)

    def c_noise(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`(num_levels - 1) t(sigma)`."""
        return (self.num_levels - 1) * self.t(sigma)


class VEPreconditioning(Preconditioning):
    """The variance-exploding networks of Song et al.: F is minus the noise.

    `c_skip = 1`, `c_out = sigma`, `c_in = 1`, `c_noise = ln(sigma / 2)`.

    Args:
        sigma_min: Smallest noise level of the network.
        sigma_max: Largest noise level of the network.

    Raises:
        ConfigError: If `0 < sigma_min < sigma_max` does not hold.

    Examples:
        >>> from ant_lightning import VEPreconditioning
        >>> VEPreconditioning().sigma_range
        (0.02, 100.0)
    """

    def __init__(self, *, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ConfigError(
                f"sigma_min: must satisfy 0 < sigma_min < sigma_max, found {sigma_min}, {sigma_max}"
            )
        self.sigma_range = (float(sigma_min), float(sigma_max))

    def c_skip(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """1."""
        return torch.ones_like(sigma)

    def c_out(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`sigma`."""
        return sigma

    def c_in(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """1."""
        return torch.ones_like(sigma)

    def c_noise(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`ln(sigma / 2)`."""
        return (sigma / 2).log()

    def target(self, sigma: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """0 and -1."""
        return torch.zeros_like(sigma), -torch.ones_like(sigma)


class IDDPMPreconditioning(_PredictsNoise):
    """The networks of improved DDPM and ADM, called at the nearest level of their table.

    F is the noise; the second half of a doubled output, its variance, is dropped. The table u of M
    noise levels follows from the cosine schedule, `u_M = 0`; `c_noise = M - 1 - (index of the
    nearest u)`.

    Args:
        c_1: C_1 of the paper, the smallest ratio of two alphas.
        c_2: C_2 of the paper, the offset of the cosine.
        num_levels: M.

    Raises:
        ConfigError: If a number is out of range.

    Examples:
        >>> from ant_lightning import IDDPMPreconditioning
        >>> [round(sigma, 4) for sigma in IDDPMPreconditioning().sigma_range]
        [0.0064, 20291.1696]
    """

    doubles_output = True

    def __init__(self, *, c_1: float = 0.001, c_2: float = 0.008, num_levels: int = 1000) -> None:
        check_at_least(2, num_levels=num_levels)
        check_between(0, 1, c_1=c_1, c_2=c_2)
        self.c_1 = c_1
        self.c_2 = c_2
        self.num_levels = num_levels
        u = [0.0]
        for j in range(num_levels, 0, -1):
            ratio = max(self._alpha_bar(j - 1) / self._alpha_bar(j), c_1)
            u.append(math.sqrt((u[-1] ** 2 + 1) / ratio - 1))
        # Descending, [M + 1]; the last entry is 0.
        self.table = torch.tensor(u[::-1], dtype=torch.float64)
        self.sigma_range = (float(self.table[-2]), float(self.table[0]))

    def _alpha_bar(self, j: int) -> float:
        return math.sin(math.pi / 2 * j / self.num_levels / (self.c_2 + 1)) ** 2

    def index(self, sigma: Float[Tensor, " b"]) -> Tensor:
        """Index of the nearest level of the table, `[b]`."""
        table = self.table.to(sigma)
        return (sigma[..., None] - table).abs().argmin(-1)

    def c_noise(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`M - 1 - index(sigma)`."""
        return (self.num_levels - 1 - self.index(sigma)).to(sigma.dtype)
