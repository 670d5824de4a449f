"""Noise schedules: small callables that give the betas of a diffusion process."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float

__all__ = [
    "CosineSchedule",
    "LinearSchedule",
    "NoiseSchedule",
    "ScaledLinearSchedule",
    "TableSchedule",
]


class NoiseSchedule(ABC):
    """Base of the schedules: calling one gives `betas` [T] in float64, each inside (0, 1).

    Args:
        num_timesteps: T, at least 1.

    Raises:
        ConfigError: `num_timesteps` is below 1.
    """

    def __init__(self, num_timesteps: int) -> None:
        if num_timesteps < 1:
            raise ConfigError(f"num_timesteps must be at least 1, found {num_timesteps}")
        self.num_timesteps = num_timesteps

    @abstractmethod
    def _betas(self) -> Tensor:
        """The variances, before they are checked."""

    def __call__(self) -> Float[Tensor, " T"]:
        """Give `betas` [T] in float64.

        Raises:
            ConfigError: some beta is outside (0, 1), so that `alphas_cumprod` would not decrease
                towards zero or would reach it (the log-SNR would be infinite).
        """
        betas = self._betas()
        outside = ~((betas > 0) & (betas < 1))
        if outside.any():
            first = int(outside.nonzero()[0, 0])
            raise ConfigError(
                f"{type(self).__name__}: every beta must be inside (0, 1), found "
                f"betas[{first}] = {float(betas[first])} with num_timesteps = {self.num_timesteps}"
            )
        return betas


def _check_range(name: str, beta_start: float, beta_end: float) -> None:
    # NaN fails every comparison, so it is refused here too.
    if not 0 < beta_start <= beta_end < 1:
        raise ConfigError(
            f"{name}: 0 < beta_start <= beta_end < 1 must hold, found "
            f"beta_start = {beta_start}, beta_end = {beta_end}"
        )


class LinearSchedule(NoiseSchedule):
    """Betas rise linearly: `betas = linspace(c beta_start, c beta_end, T)` with `c = 1000 / T`.

    The factor c keeps the total noise about the same whatever T is; below T = 21 the default
    `beta_end` would pass 1 and is refused.

    Reference: Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239.
    """

    def __init__(
        self, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> None:
        super().__init__(num_timesteps)
        _check_range("LinearSchedule", beta_start, beta_end)
        self.beta_start = beta_start
        self.beta_end = beta_end

    def _betas(self) -> Tensor:
        scale = 1000.0 / self.num_timesteps
        return torch.linspace(
            scale * self.beta_start, scale * self.beta_end, self.num_timesteps, dtype=torch.float64
        )


class CosineSchedule(NoiseSchedule):
    """Betas of a squared cosine: `abar(u) = cos²((u + 0.008) / 1.008 π/2)`, u in [0, 1].

    `betas[t] = min(1 - abar((t + 1) / T) / abar(t / T), max_beta)`.

    Reference: Nichol and Dhariwal, Improved DDPM, arXiv 2102.09672, equation 17.
    """

    def __init__(self, num_timesteps: int = 1000, max_beta: float = 0.999) -> None:
        super().__init__(num_timesteps)
        if not 0 < max_beta < 1:
            raise ConfigError(f"CosineSchedule: max_beta must be inside (0, 1), found {max_beta}")
        self.max_beta = max_beta

    def _betas(self) -> Tensor:
        u = torch.arange(self.num_timesteps + 1, dtype=torch.float64) / self.num_timesteps
        abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - abar[1:] / abar[:-1]).clamp(max=self.max_beta)


class ScaledLinearSchedule(NoiseSchedule):
    """Square roots of the betas rise linearly, as in latent diffusion; no rescaling with T.

    `betas = linspace(beta_start^½, beta_end^½, T)²`.

    Reference: Rombach et al., Latent Diffusion Models, arXiv 2112.10752.
    """

    def __init__(
        self, num_timesteps: int = 1000, beta_start: float = 0.0015, beta_end: float = 0.0195
    ) -> None:
        super().__init__(num_timesteps)
        _check_range("ScaledLinearSchedule", beta_start, beta_end)
        self.beta_start = beta_start
        self.beta_end = beta_end

    def _betas(self) -> Tensor:
        roots = torch.linspace(
            self.beta_start**0.5, self.beta_end**0.5, self.num_timesteps, dtype=torch.float64
        )
        return roots.square()


class TableSchedule(NoiseSchedule):
    """Betas given one by one, from the first timestep to the last."""

    def __init__(self, betas: Sequence[float]) -> None:
        super().__init__(len(betas))
        self.table = tuple(float(beta) for beta in betas)

    def _betas(self) -> Tensor:
        return torch.tensor(self.table, dtype=torch.float64)
