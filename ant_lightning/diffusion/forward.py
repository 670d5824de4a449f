"""The forward half of a Gaussian diffusion: tables, noising and posteriors.

A process is a plain object, not an `nn.Module`: if the network is cast to bfloat16, the tables of
the process stay in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ant_lightning.diffusion.density import Uniform
from ant_lightning.diffusion.inputs import check_images, check_timesteps
from ant_lightning.diffusion.prediction import Levels
from ant_lightning.diffusion.process import NoiseProcess
from ant_lightning.diffusion.schedules import NoiseSchedule
from ant_lightning.errors import check_instance

if TYPE_CHECKING:
    from typing import TypeAlias

    from jaxtyping import Float, Int

    from ant_lightning.diffusion.density import Density
    from ant_lightning.diffusion.process import Images

    Timesteps: TypeAlias = Int[Tensor, " b"]


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


class ForwardProcess(NoiseProcess):
    """A discrete diffusion `q(x_t | x_start) = N(sqrt(abar_t) x_start, (1 - abar_t) I)`.

    Images are `[b, c, ...]`. Timesteps are int64 `[b]` and index the tables of this process. The
    tables are float64; `gather` casts what it looks up to the dtype of the image, float32 at least.

    Args:
        schedule: The noise schedule, which returns the betas.
        density: How often training draws each timestep.

    Attributes:
        timestep_map: The timestep that the network is given at each index of the tables, `[T]`.
            The identity, unless the process is respaced.

    Raises:
        ConfigError: If a beta is outside (0, 1), or the density does not fit.

    Reference:
        Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239.
    """

    time_label: ClassVar[str] = "timestep"

    def __init__(self, schedule: NoiseSchedule, density: Density = Uniform()) -> None:
        # Not null in a config, a class, or a tensor of betas.
        example = "LinearSchedule() or TableSchedule(betas.tolist())"
        check_instance(NoiseSchedule, example, schedule=schedule)
        self._tables = _tables(schedule().double())
        # A density of t is taken at the edges `i / T` of the timesteps.
        edges = torch.linspace(0, 1, self.num_timesteps + 1, dtype=torch.float64)
        self._density = density.on_cells(edges, coordinate="time")[1]
        self.timestep_map: Int[Tensor, " T"] = torch.arange(self.num_timesteps)
        self._is_respaced = False
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
        """`log(abar) - log(1 - abar)`.

        At a terminal SNR of zero it would be minus infinity. The last entry is then extrapolated
        from the two before, so that clusters and plots have a finite axis.
        """
        # Not snr.log(): where abar is near 1, computing 1 - abar loses digits; log1p does not.
        log_snr = self.alphas_cumprod.log() - torch.log1p(-self.alphas_cumprod)
        if not log_snr[-1].isfinite():
            log_snr[-1] = 2 * log_snr[-2] - log_snr[-3] if len(log_snr) > 2 else log_snr[0] - 1
        return log_snr

    @property
    def density(self) -> Float[Tensor, " T"]:
        """Share of the training draws that each timestep has."""
        return self._density

    @property
    def edges(self) -> Float[Tensor, " T+1"]:
        """0 .. T: timestep t is drawn as the cell from t to t + 1."""
        return torch.arange(self.num_timesteps + 1, dtype=torch.float64)

    @property
    def min_time(self) -> float:
        """0."""
        return 0

    @property
    def max_time(self) -> float:
        """T - 1."""
        return self.num_timesteps - 1

    def tables(self, device: torch.device) -> Tables:
        """All tables on `device`, copied there once; float32 if the device has no float64."""
        if device not in self._on_device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._on_device[device] = Tables(*(each.to(device, dtype) for each in self._tables))
        return self._on_device[device]

    def times(self, cells: Timesteps, u: Float[Tensor, " b"] | None = None) -> Timesteps:
        """The timesteps themselves."""
        return cells

    def levels(self, x: Images, times: Timesteps) -> Levels:
        """`a = sqrt(abar)` and `s = sqrt(1 - abar)`; `v` is `a eps - s x_start`.

        This v is the derivative by the angle `arctan(s / a)`, not by the timestep.
        """
        check_images(x=x)
        check_timesteps(self, times)
        tables = self.tables(x.device)
        a = gather(tables.sqrt_alphas_cumprod, times, x)
        s = gather(tables.sqrt_one_minus_alphas_cumprod, times, x)
        return Levels(a, s, a_rate=-s, s_rate=a, det=1.0)

    def log_snr_at(self, times: Timesteps) -> Float[Tensor, " b"]:
        """Entries of `log_snr`."""
        check_timesteps(self, times)
        return self.log_snr.to(times.device, non_blocking=True)[times]

    def network_inputs(self, x_t: Images, times: Timesteps) -> tuple[Images, Timesteps]:
        """The images as they are, and training's timesteps."""
        check_images(x_t=x_t)
        check_timesteps(self, times)
        if not self._is_respaced:
            return x_t, times
        return x_t, self.timestep_map.to(times.device)[times]

    def q_sample(self, x_start: Images, timesteps: Timesteps, noise: Images) -> Images:
        """`noised(x_start, noise, timesteps)` with the arguments in the order of guided-diffusion.

        `x_t = sqrt(abar_t) x_start + sqrt(1 - abar_t) noise`. `noised` is the method of all
        processes.
        """
        check_timesteps(self, timesteps)
        return self.noised(x_start, noise, timesteps)  # Ho et al., equation 4

    def q_posterior(
        self, x_start: Images, x_t: Images, timesteps: Timesteps
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of `q(x_{t-1} | x_t, x_start)`.

        The mean is `[b, c, ...]`, the other two are `[b, 1, ...]`.

        Reference:
            Ho et al., equations 6 and 7, arXiv 2006.11239.
        """
        check_images(x_start=x_start, x_t=x_t)
        check_timesteps(self, timesteps)
        tables = self.tables(x_t.device)
        mean = (
            gather(tables.posterior_mean_coef1, timesteps, x_t) * x_start
            + gather(tables.posterior_mean_coef2, timesteps, x_t) * x_t
        )
        variance = gather(tables.posterior_variance, timesteps, x_t)
        return mean, variance, gather(tables.posterior_log_variance_clipped, timesteps, x_t)
