"""The forward half of a Gaussian diffusion: tables, noising and posteriors.

A process is a plain object, not a module: casting a network to bfloat16 cannot touch its tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ant_lightning.diffusion.tables import Tables, gather, make_tables

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from ant_lightning.diffusion.schedules import NoiseSchedule

__all__ = ["ForwardProcess"]


class ForwardProcess:
    """A discrete diffusion `q(x_t | x_start) = N(sqrt(abar_t) x_start, (1 - abar_t) I)`.

    Images are [b, c, ...], timesteps int64 [b] that index this process' own tables. Tables are
    float64; coefficients are cast to the dtype of the image, at least float32.

    Args:
        schedule: gives the betas.

    Raises:
        ConfigError: betas outside (0, 1).

    Reference: Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        self._tables = make_tables(schedule())
        self._timestep_map = torch.arange(self.num_timesteps)
        self._on_device: dict[torch.device, Tables] = {}

    def __getstate__(self) -> dict[str, Any]:
        # The caches are rebuilt on demand: a copy must not carry another machine's devices.
        return {**self.__dict__, "_on_device": {}}

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self._tables.betas)

    @property
    def betas(self) -> Float[Tensor, " T"]:
        """The variances of the forward steps."""
        return self._tables.betas

    @property
    def alphas_cumprod(self) -> Float[Tensor, " T"]:
        """`abar_t = Π_{i <= t} (1 - beta_i)`."""
        return self._tables.alphas_cumprod

    @property
    def snr(self) -> Float[Tensor, " T"]:
        """`abar / (1 - abar)`."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @property
    def log_snr(self) -> Float[Tensor, " T"]:
        """`log(abar) - log(1 - abar)`."""
        return self.alphas_cumprod.log() - torch.log1p(-self.alphas_cumprod)

    @property
    def timestep_map(self) -> Int[Tensor, " T"]:
        """What the network is told at each timestep; the identity unless respaced."""
        return self._timestep_map

    def tables(self, device: torch.device) -> Tables:
        """All tables, on `device` (copied once)."""
        if device not in self._on_device:
            self._on_device[device] = self._tables.to(device)
        return self._on_device[device]

    def _levels(self, x: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        tables = self.tables(x.device)
        return {
            "a": gather(tables.sqrt_alphas_cumprod, timesteps, x),
            "s": gather(tables.sqrt_one_minus_alphas_cumprod, timesteps, x),
        }

    def q_sample(
        self,
        x_start: Float[Tensor, "b c ..."],
        timesteps: Int[Tensor, " b"],
        noise: Float[Tensor, "b c ..."],
    ) -> Float[Tensor, "b c ..."]:
        """Noise images: `x_t = sqrt(abar_t) x_start + sqrt(1 - abar_t) noise`."""
        level = self._levels(x_start, timesteps)
        return level["a"] * x_start + level["s"] * noise

    def q_posterior(
        self,
        x_start: Float[Tensor, "b c ..."],
        x_t: Float[Tensor, "b c ..."],
        timesteps: Int[Tensor, " b"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance, clipped log-variance of q(x_{t-1} | x_t, x_start); [b, 1, ...] the last.

        Reference: Ho et al., arXiv 2006.11239, equations 6 and 7.
        """
        tables = self.tables(x_t.device)
        mean = (
            gather(tables.posterior_mean_coef1, timesteps, x_t) * x_start
            + gather(tables.posterior_mean_coef2, timesteps, x_t) * x_t
        )
        variance = gather(tables.posterior_variance, timesteps, x_t)
        return mean, variance, gather(tables.posterior_log_variance_clipped, timesteps, x_t)
