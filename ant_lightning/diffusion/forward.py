"""The forward half of a Gaussian diffusion: tables, noising and posteriors.

A process is a plain object, not an `nn.Module`: if the network is cast to bfloat16, the tables of
the process stay in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import TypeAlias

    from jaxtyping import Float, Int

    from ant_lightning.diffusion.schedules import NoiseSchedule

    Images: TypeAlias = Float[Tensor, "b c ..."]
    Timesteps: TypeAlias = Int[Tensor, " b"]

__all__ = ["ForwardProcess", "Tables", "at_least_float32", "gather"]


class Tables(NamedTuple):
    """The tables of a process, `[T]` each, float64; the names are those of guided-diffusion.

    `fixed_large_variance` is `betas` with entry 0 replaced by the posterior variance at t = 1.
    """

    betas: Tensor
    log_betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    alphas_cumprod_next: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    fixed_large_variance: Tensor
    fixed_large_log_variance: Tensor


def _tables(betas: Float[Tensor, " T"]) -> Tables:
    """Compute all tables.

    `abar` is `alphas_cumprod`; `abar_prev` is `abar` one timestep earlier, and 1 at t = 0.

    `posterior_variance = beta (1 - abar_prev) / (1 - abar)`,
    `posterior_mean = sqrt(abar_prev) beta / (1 - abar) x_start
    + sqrt(1 - beta) (1 - abar_prev) / (1 - abar) x_t`.

    Reference:
        Ho et al., "Denoising Diffusion Probabilistic Models", equations 6 and 7, arXiv 2006.11239.
    """
    abar = torch.cumprod(1 - betas, dim=0)
    previous = torch.cat([betas.new_ones(1), abar[:-1]])
    variance = betas * (1 - previous) / (1 - abar)  # equation 7
    # The posterior variance at t = 0 is 0 and has no logarithm. The clipped table repeats the value
    # of t = 1 there. With T = 1 there is no t = 1; its one step adds no noise, so any value serves.
    first = variance[1:2] if len(betas) > 1 else betas
    # As in the official code, entry 0 of the large variance is the posterior variance of t = 1 too.
    large = torch.cat([first, betas[1:]])
    return Tables(
        betas=betas,
        log_betas=betas.log(),
        alphas_cumprod=abar,
        alphas_cumprod_prev=previous,
        # Ends in 0, pure noise: the end of DDIM inversion.
        alphas_cumprod_next=torch.cat([abar[1:], betas.new_zeros(1)]),
        sqrt_alphas_cumprod=abar.sqrt(),
        sqrt_one_minus_alphas_cumprod=(1 - abar).sqrt(),
        posterior_variance=variance,
        posterior_log_variance_clipped=torch.cat([first, variance[1:]]).log(),
        # Equation 7: the mean is coef1 x_start + coef2 x_t.
        posterior_mean_coef1=betas * previous.sqrt() / (1 - abar),
        posterior_mean_coef2=(1 - previous) * (1 - betas).sqrt() / (1 - abar),
        fixed_large_variance=large,
        fixed_large_log_variance=large.log(),
    )


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32; leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gather(table: Float[Tensor, " T"], timesteps: Timesteps, like: Images) -> Images:
    """Look up `timesteps` in a table; returns `[b, 1, ...]`, which broadcasts against `like`.

    The values have the dtype of `like`, or float32 if `like` has half precision.

    Raises:
        IndexError: If a timestep is negative or not below T (on the CPU; on a GPU the kernel
            asserts).
    """
    # `index_select` refuses a negative timestep; plain indexing would wrap around.
    values = table.index_select(0, timesteps)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return values.to(dtype).view(-1, *[1] * (like.ndim - 1))


class ForwardProcess:
    """A discrete diffusion `q(x_t | x_start) = N(sqrt(abar_t) x_start, (1 - abar_t) I)`.

    Images are `[b, c, ...]`. Timesteps are int64 `[b]` and index the tables of this process. The
    tables are float64; `gather` casts what it looks up to the dtype of the image, float32 at least.

    Args:
        schedule: The noise schedule, which returns the betas.

    Attributes:
        timestep_map: The timestep that the network is given at each index of the tables, `[T]`.
            The identity, unless the process is respaced.

    Raises:
        ConfigError: If a beta is outside (0, 1).

    Reference:
        Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        self._tables = _tables(schedule().double())
        self.timestep_map: Int[Tensor, " T"] = torch.arange(self.num_timesteps)
        self._on_device: dict[torch.device, Tables] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts with an empty cache: it may be unpickled on a machine without these devices.
        return {**self.__dict__, "_on_device": {}}

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps, T."""
        return len(self.betas)

    @property
    def betas(self) -> Float[Tensor, " T"]:
        """Variances of the forward steps, `[T]`."""
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
        # Not snr.log(): where abar is near 1, computing 1 - abar loses digits; log1p does not.
        return self.alphas_cumprod.log() - torch.log1p(-self.alphas_cumprod)

    def tables(self, device: torch.device) -> Tables:
        """All tables on `device`, copied there once; float32 if the device has no float64."""
        if device not in self._on_device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._on_device[device] = Tables(*(each.to(device, dtype) for each in self._tables))
        return self._on_device[device]

    def levels(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Signal `sqrt(abar)` and noise level `sqrt(1 - abar)`, `[b, 1, ...]` each."""
        tables = self.tables(x.device)
        return (
            gather(tables.sqrt_alphas_cumprod, timesteps, x),
            gather(tables.sqrt_one_minus_alphas_cumprod, timesteps, x),
        )

    def q_sample(self, x_start: Images, timesteps: Timesteps, noise: Images) -> Images:
        """Add noise to images: `x_t = sqrt(abar_t) x_start + sqrt(1 - abar_t) noise`."""
        a, s = self.levels(x_start, timesteps)
        return a * x_start + s * noise  # Ho et al., equation 4

    def q_posterior(
        self, x_start: Images, x_t: Images, timesteps: Timesteps
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of `q(x_{t-1} | x_t, x_start)`.

        The mean is `[b, c, ...]`, the other two are `[b, 1, ...]`.

        Reference:
            Ho et al., equations 6 and 7, arXiv 2006.11239.
        """
        tables = self.tables(x_t.device)
        mean = (
            gather(tables.posterior_mean_coef1, timesteps, x_t) * x_start
            + gather(tables.posterior_mean_coef2, timesteps, x_t) * x_t
        )
        variance = gather(tables.posterior_variance, timesteps, x_t)
        return mean, variance, gather(tables.posterior_log_variance_clipped, timesteps, x_t)
