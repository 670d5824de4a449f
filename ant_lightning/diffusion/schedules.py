"""Noise schedules: small callables that return the betas of a diffusion process."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError, check_at_least, check_between

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float


class NoiseSchedule(ABC):
    """Base of the schedules. A call returns `betas` `[T]` in float64, each inside (0, 1).

    Only the last beta may be 1: `alphas_cumprod` then ends at 0, a terminal SNR of zero.

    A subclass implements `_betas`.

    Args:
        num_timesteps: T, at least 1.

    Raises:
        ConfigError: If `num_timesteps` is below 1.

    Examples:
        >>> import torch
        >>> from ant_lightning import NoiseSchedule
        >>> class ConstantSchedule(NoiseSchedule):
        ...     def _betas(self):
        ...         return torch.full((self.num_timesteps,), 0.5, dtype=torch.float64)
        >>> ConstantSchedule(3)().tolist()
        [0.5, 0.5, 0.5]
    """

    _may_end_at_one: ClassVar[bool] = False

    def __init__(self, num_timesteps: int) -> None:
        check_at_least(1, num_timesteps=num_timesteps)
        self.num_timesteps = num_timesteps

    @abstractmethod
    def _betas(self) -> Tensor:
        """The variances of the forward steps, unchecked."""

    def __call__(self) -> Float[Tensor, " T"]:
        """The `betas` `[T]` in float64.

        Raises:
            ConfigError: If there are not T betas, they are `alphas_cumprod` instead, or one is
                outside (0, 1), unless it is 1 and the last of `ZeroTerminalSNR` or a table. At 0 or
                below, `alphas_cumprod` would not decrease; at 1 it reaches 0, where nothing of the
                image is left.
        """
        betas = self._betas()
        _check_table(betas, type(self).__name__, self.num_timesteps)
        # Not `betas <= 0 | betas >= 1`, which NaN would pass.
        outside = ~((betas > 0) & (betas < 1))
        if self._may_end_at_one and len(betas) > 1 and float(betas[-1]) == 1:
            outside[-1] = False
        if outside.any():
            first = int(outside.nonzero()[0, 0])
            raise ConfigError(
                f"{type(self).__name__}: every beta must be inside (0, 1), found betas[{first}] = "
                f"{float(betas[first])} for {self.num_timesteps} timesteps"
            )
        return betas


def _check_table(betas: object, schedule: str, num_timesteps: int) -> None:
    if not isinstance(betas, Tensor) or betas.shape != (num_timesteps,):
        found = list(betas.shape) if isinstance(betas, Tensor) else f"a {type(betas).__name__}"
        raise ConfigError(
            f"{schedule}: must return betas as a tensor [{num_timesteps}] (num_timesteps), "
            f"found {found}"
        )
    # With such betas nine tenths of the image's variance were gone at timestep 0.
    falls = len(betas) >= 10 and bool((betas.diff() < 0).all())
    if falls and float(betas[0]) > 0.9 and float(betas[-1]) < 0.1:
        raise ConfigError(
            f"{schedule}: must return betas, and not alphas_cumprod (betas[t] = 1 - "
            "alphas_cumprod[t] / alphas_cumprod[t - 1]), found values that fall from "
            f"{float(betas[0]):.4g} to {float(betas[-1]):.4g}"
        )


def _check_range(beta_start: float, beta_end: float) -> None:
    if not 0 < beta_start <= beta_end < 1:  # NaN is refused too
        raise ConfigError(
            "beta_start: must satisfy 0 < beta_start <= beta_end < 1, found "
            f"beta_start = {beta_start}, beta_end = {beta_end}"
        )


class LinearSchedule(NoiseSchedule):
    """Betas rise linearly: `betas = linspace(c beta_start, c beta_end, T)` with `c = 1000 / T`.

    The factor c keeps the total noise about the same for any T, as in guided-diffusion. With the
    default `beta_end`, a T of 20 or less makes the last beta 1 or more, which is refused.

    Args:
        num_timesteps: T.
        beta_start: First beta for T = 1000.
        beta_end: Last beta for T = 1000.

    Raises:
        ConfigError: If `0 < beta_start <= beta_end < 1` does not hold.

    Reference:
        Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239.

    Examples:
        >>> from ant_lightning import LinearSchedule
        >>> [round(beta, 4) for beta in LinearSchedule(100)()[[0, -1]].tolist()]
        [0.001, 0.2]
    """

    def __init__(
        self, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> None:
        super().__init__(num_timesteps)
        _check_range(beta_start, beta_end)
        self.beta_start = beta_start
        self.beta_end = beta_end

    def _betas(self) -> Tensor:
        start, end = (1000 / self.num_timesteps * x for x in (self.beta_start, self.beta_end))
        return torch.linspace(start, end, self.num_timesteps, dtype=torch.float64)


class CosineSchedule(NoiseSchedule):
    """`alphas_cumprod` falls as a squared cosine.

    `abar(u) = cos²((u + 0.008) / 1.008 π/2)` for u in [0, 1], and
    `betas[t] = min(1 - abar((t + 1) / T) / abar(t / T), max_beta)`.

    Args:
        num_timesteps: T.
        max_beta: Upper limit of the betas, inside (0, 1).

    Raises:
        ConfigError: If `max_beta` is outside (0, 1).

    Reference:
        Nichol and Dhariwal, "Improved DDPM", equation 17, arXiv 2102.09672.

    Examples:
        >>> from ant_lightning import CosineSchedule
        >>> [round(beta, 3) for beta in CosineSchedule(1000)()[[0, 500, 999]].tolist()]
        [0.0, 0.003, 0.999]
    """

    def __init__(self, num_timesteps: int = 1000, max_beta: float = 0.999) -> None:
        super().__init__(num_timesteps)
        check_between(0, 1, max_beta=max_beta)
        self.max_beta = max_beta

    def _betas(self) -> Tensor:
        u = torch.arange(self.num_timesteps + 1, dtype=torch.float64) / self.num_timesteps
        abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
        # Equation 17. The paper divides by abar(0); only ratios enter here, so it cancels. The last
        # ratio is 0 (the cosine of π/2): without the limit, its beta would be 1.
        return (1 - abar[1:] / abar[:-1]).clamp(max=self.max_beta)


class ScaledLinearSchedule(NoiseSchedule):
    """Square roots of the betas rise linearly, as in latent diffusion; no rescaling with T.

    `betas = linspace(beta_start^½, beta_end^½, T)²`.

    Args:
        num_timesteps: T.
        beta_start: First beta.
        beta_end: Last beta.

    Raises:
        ConfigError: If `0 < beta_start <= beta_end < 1` does not hold.

    Reference:
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
        arXiv 2112.10752.

    Examples:
        >>> from ant_lightning import ScaledLinearSchedule
        >>> [round(beta, 4) for beta in ScaledLinearSchedule(1000)()[[0, -1]].tolist()]
        [0.0015, 0.0195]
    """

    def __init__(
        self, num_timesteps: int = 1000, beta_start: float = 0.0015, beta_end: float = 0.0195
    ) -> None:
        super().__init__(num_timesteps)
        _check_range(beta_start, beta_end)
        self.beta_start = beta_start
        self.beta_end = beta_end

    def _betas(self) -> Tensor:
        roots = (self.beta_start**0.5, self.beta_end**0.5)
        return torch.linspace(*roots, self.num_timesteps, dtype=torch.float64).square()


class TableSchedule(NoiseSchedule):
    """Betas from a list, first timestep first.

    Args:
        betas: The betas; the last may be 1 (a terminal SNR of zero).

    Examples:
        >>> from ant_lightning import TableSchedule
        >>> TableSchedule([0.1, 0.2])().tolist()
        [0.1, 0.2]
    """

    _may_end_at_one: ClassVar[bool] = True

    def __init__(self, betas: Sequence[float]) -> None:
        super().__init__(len(betas))
        self.table = tuple(float(beta) for beta in betas)

    def _betas(self) -> Tensor:
        return torch.tensor(self.table, dtype=torch.float64)


class ZeroTerminalSNR(NoiseSchedule):
    """Another schedule, rescaled so that its last timestep is pure noise.

    `sqrt(abar)` is shifted to end at 0 and scaled to keep its first value:
    `sqrt(abar_t)' = (sqrt(abar_t) - sqrt(abar_T)) sqrt(abar_1) / (sqrt(abar_1) - sqrt(abar_T))`.
    The network must predict v or x0: at the last timestep eps says nothing about the image.

    Args:
        schedule: The schedule to rescale, of at least two timesteps.

    Raises:
        ConfigError: If the schedule has one timestep.

    Reference:
        Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1,
        arXiv 2305.08891.

    Examples:
        >>> from ant_lightning import LinearSchedule, ZeroTerminalSNR
        >>> ZeroTerminalSNR(LinearSchedule(1000))()[-1].item()
        1.0
    """

    _may_end_at_one: ClassVar[bool] = True

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__(schedule.num_timesteps)
        if schedule.num_timesteps < 2:
            raise ConfigError("schedule: must have at least 2 timesteps, found 1")
        self.schedule = schedule

    def _betas(self) -> Tensor:
        roots = torch.cumprod(1 - self.schedule(), dim=0).sqrt()
        roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
        abar = roots.square()
        return 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
