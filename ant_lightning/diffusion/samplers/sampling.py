"""DDPM and DDIM, exact to the official loops, on float64 tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ant_lightning.diffusion.samplers.steps import ancestral_step, ddim_inverse_step, ddim_step
from ant_lightning.diffusion.samplers.table_sampler import TableSampler, denoise_at
from ant_lightning.diffusion.tables import at_least_float32
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float

    from ant_lightning.diffusion.process import DiscreteDiffusion, PMeanVariance
    from ant_lightning.diffusion.samplers.sampler import Denoiser

__all__ = ["DDIM", "DDPM"]


class DDPM(TableSampler):
    """Ancestral sampling, with fixed or learned variance.

    Args:
        num_steps: network calls per image.
        spacing: "even" has the first and the last timestep; "ddim" a whole stride from 0.

    Raises:
        ConfigError: `num_steps` below 1 or, once a process is known, above its timesteps or
            impossible with that spacing.

    Reference: Ho et al., arXiv 2006.11239; Nichol and Dhariwal, arXiv 2102.09672 (fewer steps).
    """

    def __init__(self, num_steps: int = 250, *, spacing: Literal["even", "ddim"] = "even") -> None:
        super().__init__(num_steps=num_steps, spacing=spacing, spacings=("even", "ddim"))

    @property
    def _is_random(self) -> bool:
        return True

    def _step(
        self, process: DiscreteDiffusion, model: PMeanVariance, t: Tensor, noise: Tensor | None
    ) -> Tensor:
        return ancestral_step(model, t, noise)


class DDIM(TableSampler):
    """DDIM sampling and inversion; a learned variance is ignored.

    Args:
        num_steps: network calls per image.
        eta: 0 is deterministic, 1 as random as ancestral sampling.
        spacing: "ddim" is guided diffusion's whole stride from timestep 0; "even" has the first
            and the last timestep; "ldm" is latent diffusion's 1, 1 + c, ..., which may make more
            calls than `num_steps` and stops at timestep 0 without denoising it; "ldm_quadratic"
            is its `quad`, dense near 0, which may make fewer: see `latent_ddim_timesteps`.

    Raises:
        ConfigError: `num_steps` below 1, `eta` outside [0, 1] or, once a process is known,
            `num_steps` above its timesteps or impossible with that spacing.

    Reference: Song et al., DDIM, arXiv 2010.02502.
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
        if not 0 <= eta <= 1:
            raise ConfigError(f"DDIM: eta must be in [0, 1], found {eta}")
        self.eta = eta

    @property
    def _is_random(self) -> bool:
        return self.eta > 0

    def _step(
        self, process: DiscreteDiffusion, model: PMeanVariance, t: Tensor, noise: Tensor | None
    ) -> Tensor:
        return ddim_step(process, model, t, eta=self.eta, noise=noise)

    def invert(
        self,
        process: DiscreteDiffusion,
        denoiser: Denoiser,
        x_start: Float[Tensor, "b c ..."],
        *,
        clip_denoised: bool = True,
    ) -> Float[Tensor, "b c ..."]:
        """Find the x_T from which `eta = 0` sampling leads back, nearly, to `x_start`.

        x_start is taken for the state at the path's first timestep, and each step uses the
        network at the less noisy end, as official; so the error falls with more steps. The
        network is called once less than there are timesteps on the path.
        """
        path = self.respaced(process)
        x = x_start.to(at_least_float32(x_start))
        with torch.no_grad():
            for step in range(path.num_timesteps - 1):
                model, t = denoise_at(path, denoiser, x, step, clip_denoised)
                x = ddim_inverse_step(path, model, t)
        return x
