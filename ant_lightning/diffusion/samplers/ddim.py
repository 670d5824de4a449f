"""DDPM and DDIM: the official sampling loops, with tables in float64."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ant_lightning.diffusion.discrete import DiscreteDiffusion
from ant_lightning.diffusion.forward import gather
from ant_lightning.diffusion.process import at_least_float32
from ant_lightning.diffusion.samplers.base import Denoiser, Sampler, SampleStep
from ant_lightning.diffusion.samplers.spacing import (
    latent_ddim_timesteps,
    space_timesteps,
    strided_timesteps,
)
from ant_lightning.errors import ConfigError, check_at_least, check_one_of, check_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ant_lightning.diffusion.forward import Timesteps
    from ant_lightning.diffusion.losses import PMeanVariance
    from ant_lightning.diffusion.process import Images


class _RespacedSampler(Sampler):
    """Base of the samplers that respace the process and visit its timesteps from last to first."""

    process_type = DiscreteDiffusion

    def __init__(self, *, num_steps: int, spacing: str, spacings: tuple[str, ...]) -> None:
        check_at_least(1, num_steps=num_steps)
        check_one_of(spacings, spacing=spacing)
        self.num_steps = num_steps
        self.spacing = spacing

    def respaced(self, process: DiscreteDiffusion) -> DiscreteDiffusion:
        """The process on the timesteps of the path; `respace` caches it."""
        total = process.num_timesteps
        if self.num_steps > total:
            raise ConfigError(
                f"num_steps: must be at most the process' {total} timesteps, found {self.num_steps}"
            )
        if self._first_denoised:
            quadratic = self.spacing == "ldm_quadratic"
            path = latent_ddim_timesteps(total, self.num_steps, quadratic=quadratic)
            return process.respace([0, *path])
        if self.spacing == "ddim":
            return process.respace(strided_timesteps(total, self.num_steps))
        return process.respace(space_timesteps(total, [self.num_steps]))

    @property
    def _first_denoised(self) -> int:
        """Index of the last timestep that the path denoises: 0, or 1 for the spacings of LDM."""
        # Latent diffusion's last step leads to the noise level of timestep 0 (abar_0, not 1) and
        # stops there. Timestep 0 is therefore in the tables, but the network is not called at it.
        return int(self.spacing in {"ldm", "ldm_quadratic"})

    def num_calls(self, process: DiscreteDiffusion) -> int:
        """Number of network calls on a whole path."""
        return self.respaced(process).num_timesteps - self._first_denoised

    @abstractmethod
    def _step(
        self, process: DiscreteDiffusion, model: PMeanVariance, t: Tensor, noise: Tensor | None
    ) -> Tensor: ...

    def _steps(
        self,
        process: DiscreteDiffusion,
        denoiser: Denoiser,
        x: Tensor,
        *,
        noise: Callable[[], Tensor] | None,
        clip_denoised: bool,
        first_step: int,
    ) -> Iterator[SampleStep]:
        process = self.respaced(process)
        path = range(process.num_timesteps - 1, self._first_denoised - 1, -1)
        for index, step in list(enumerate(path))[first_step:]:
            model, t = _denoised(process, denoiser, x, step, clip_denoised)
            # The step from timestep 0 adds no noise, so none is drawn for it.
            drawn = noise() if noise is not None and self.is_random and step > 0 else None
            x = self._step(process, model, t, drawn)
            yield SampleStep(index, int(process.timestep_map[step]), x, model.x_start)


class DDPM(_RespacedSampler):
    """Ancestral sampling, with fixed or learned variance.

    Args:
        num_steps: Network calls for each image.
        spacing: `even`: evenly spaced, with the first and the last timestep. `ddim`: a whole
            stride from timestep 0.

    Raises:
        ConfigError: If `num_steps` is below 1. When sampling starts: if `num_steps` exceeds the
            timesteps of the process, or the spacing cannot have that many.

    Reference:
        Ho et al., arXiv 2006.11239; Nichol and Dhariwal, arXiv 2102.09672 (fewer steps).

    Examples:
        >>> import torch
        >>> from ant_lightning import DDPM, DiscreteDiffusion
        >>> def denoiser(x, t):  # the exact network if all pixels of all images are 0.5
        ...     abar = process.alphas_cumprod[t].view(-1, 1, 1, 1)
        ...     return (x - abar.sqrt() * 0.5) / (1 - abar).sqrt()
        >>> process = DiscreteDiffusion()
        >>> noise = lambda: torch.randn(2, 3, 4, 4)
        >>> x = DDPM(num_steps=20).sample(process, denoiser, noise(), noise=noise)
        >>> x.shape, round(x.mean().item(), 3)
        (torch.Size([2, 3, 4, 4]), 0.5)
    """

    is_random = True

    def __init__(self, num_steps: int = 250, *, spacing: Literal["even", "ddim"] = "even") -> None:
        super().__init__(num_steps=num_steps, spacing=spacing, spacings=("even", "ddim"))

    def _step(
        self, process: DiscreteDiffusion, model: PMeanVariance, t: Tensor, noise: Tensor | None
    ) -> Tensor:
        return ancestral_step(model, t, noise)


class DDIM(_RespacedSampler):
    """DDIM sampling and inversion; a learned variance is ignored.

    Args:
        num_steps: Network calls for each image.
        eta: 0 is deterministic, 1 as random as ancestral sampling.
        spacing: `ddim`: guided-diffusion's whole stride from timestep 0. `even`: evenly spaced,
            with the first and the last timestep. `ldm`: latent diffusion's 1, 1 + c, ...; may make
            more calls than `num_steps`, and stops at timestep 0 without denoising it.
            `ldm_quadratic`: latent diffusion's `quad`, dense near 0; may make fewer calls. See
            `latent_ddim_timesteps`.

    Raises:
        ConfigError: If `num_steps` is below 1, or `eta` is outside [0, 1]. When sampling starts: if
            `num_steps` exceeds the timesteps of the process, or the spacing cannot have that many.

    Reference:
        Song et al., "Denoising Diffusion Implicit Models", arXiv 2010.02502.

    Examples:
        >>> import torch
        >>> from ant_lightning import DDIM, DiscreteDiffusion
        >>> def denoiser(x, t):  # the exact network if all pixels of all images are 0.5
        ...     abar = process.alphas_cumprod[t].view(-1, 1, 1, 1)
        ...     return (x - abar.sqrt() * 0.5) / (1 - abar).sqrt()
        >>> process = DiscreteDiffusion()
        >>> x = DDIM(num_steps=20).sample(process, denoiser, torch.zeros(1, 3, 4, 4))
        >>> x.shape, round(x.mean().item(), 3)
        (torch.Size([1, 3, 4, 4]), 0.5)
    """

    def __init__(
        self,
        num_steps: int = 50,
        *,
        eta: float = 0.0,
        spacing: Literal["ddim", "even", "ldm", "ldm_quadratic"] = "ddim",
    ) -> None:
        spacings = ("ddim", "even", "ldm", "ldm_quadratic")
        super().__init__(num_steps=num_steps, spacing=spacing, spacings=spacings)
        check_range(0, 1, eta=eta)
        self.eta = eta

    @property
    def is_random(self) -> bool:
        """Whether `eta` is above 0."""
        return self.eta > 0

    def _step(
        self, process: DiscreteDiffusion, model: PMeanVariance, t: Tensor, noise: Tensor | None
    ) -> Tensor:
        return ddim_step(process, model, t, eta=self.eta, noise=noise)

    @torch.no_grad()
    def invert(
        self,
        process: DiscreteDiffusion,
        denoiser: Denoiser,
        x_start: Images,
        *,
        clip_denoised: bool = True,
    ) -> Images:
        """Find the `x_T` from which sampling with `eta = 0` nearly returns to `x_start`.

        `x_start` is treated as the state at the path's lowest timestep. As in the official code,
        each step calls the network at its less noisy end, while sampling calls it at the noisier
        end; the two agree better the more steps there are. A path of n timesteps takes n - 1 calls.
        """
        path = self.respaced(process)
        x = at_least_float32(x_start)
        for step in range(path.num_timesteps - 1):
            model, t = _denoised(path, denoiser, x, step, clip_denoised)
            x = ddim_inverse_step(path, model, t)
        return x


def ancestral_step(model: PMeanVariance, timesteps: Timesteps, noise: Images | None) -> Images:
    """Sample `p(x_{t-1} | x_t)`: `mean + exp(½ log_variance) noise`, without noise at t = 0.

    `noise=None` gives the mean.

    Reference:
        Ho et al., algorithm 2, arXiv 2006.11239.
    """
    if noise is None:
        return model.mean
    return model.mean + _nonzero(timesteps, noise) * (0.5 * model.log_variance).exp() * noise


def ddim_step(
    process: DiscreteDiffusion,
    model: PMeanVariance,
    timesteps: Timesteps,
    *,
    eta: float = 0.0,
    noise: Images | None = None,
) -> Images:
    """One DDIM step; `eta = 0` is deterministic, `eta = 1` as random as ancestral sampling.

    `x_{t-1} = sqrt(abar_prev) x_start + sqrt(1 - abar_prev - σ²) eps + σ noise`, with
    `σ = eta sqrt((1 - abar_prev) / (1 - abar)) sqrt(1 - abar / abar_prev)`; no noise at t = 0.

    Reference:
        Song et al., "DDIM", equations 12 and 16, arXiv 2010.02502.
    """
    tables = process.tables(model.x_start.device)
    previous = tables.alphas_cumprod_prev
    # σ², equation 16: the posterior variance is the square of its two roots.
    variance = eta**2 * tables.posterior_variance
    # In float64, because 1 - abar_prev - σ² cancels. Rounding can still leave it just below 0.
    direction = (1 - previous - variance).clamp(min=0).sqrt()
    x = model.x_start
    # Equation 12.
    x_prev = gather(previous.sqrt(), timesteps, x) * x + gather(direction, timesteps, x) * model.eps
    if noise is None or eta == 0:
        return x_prev
    return x_prev + _nonzero(timesteps, x) * gather(variance.sqrt(), timesteps, x) * noise


def ddim_inverse_step(
    process: DiscreteDiffusion, model: PMeanVariance, timesteps: Timesteps
) -> Images:
    """One DDIM step backwards, to more noise: `sqrt(abar_next) x_start + sqrt(1 - abar_next) eps`.

    At the last timestep `abar_next` is 0, and the result is eps.

    Reference:
        Song et al., section 4.3 (the ODE, integrated the other way), arXiv 2010.02502.
    """
    following = process.tables(model.x_start.device).alphas_cumprod_next
    signal = gather(following.sqrt(), timesteps, model.x_start)
    return signal * model.x_start + gather((1 - following).sqrt(), timesteps, model.eps) * model.eps


def _denoised(
    process: DiscreteDiffusion, denoiser: Denoiser, x: Tensor, step: int, clip_denoised: bool
) -> tuple[PMeanVariance, Tensor]:
    """Call the network at index `step` of a respaced process; also returns that index, `[b]`."""
    # `t` indexes the tables of the respaced process; the network knows the timesteps of training.
    t = torch.full((len(x),), step, dtype=torch.int64, device=x.device)
    output = denoiser(x, torch.full_like(t, int(process.timestep_map[step])))
    return process.p_mean_variance(output, x, t, clip_denoised=clip_denoised), t


def _nonzero(timesteps: Tensor, like: Tensor) -> Tensor:
    return (timesteps != 0).to(like.dtype).view(-1, *[1] * (like.ndim - 1))
