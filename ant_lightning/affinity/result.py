"""What a measurement of task affinity gives: dot products, and all that follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ant_lightning.affinity.estimators import (
    corrected_affinity,
    corrected_standard_error,
    plain_affinity,
)
from ant_lightning.affinity.grid import check_log_snr, check_timesteps
from ant_lightning.affinity.reliability import reliability_message, split_half_reliability
from ant_lightning.affinity.result_file import load_affinity, save_affinity
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jaxtyping import Float

__all__ = ["AffinityResult"]


@dataclass(frozen=True, eq=False)
class AffinityResult:
    """Task affinity on a grid of `n` timesteps, averaged over `c` checkpoints.

    Attributes:
        timesteps: The grid, increasing, in `0 .. num_timesteps - 1`.
        num_timesteps: `T` of the schedule.
        half_dots: `[c, 2, 2, n, n]` float64, `half_dots[c, g, h, i, j]` the product of the gradient
            at timestep i of half g with that at j of half h, for each checkpoint.
        seed: Of the noise (as the caller says) and of the sketch.
        model: What was measured, in free words.
        num_parameters: `p`.
        sketch_dim: `m` if the gradients were sketched, None if they were kept whole.
        log_snr: Of the schedule, `[T]` float64, if it was given.

    Raises:
        ConfigError: If shapes or values do not belong together.
    """

    timesteps: tuple[int, ...]
    num_timesteps: int
    half_dots: Float[Tensor, "c 2 2 n n"]
    seed: int = 0
    model: str = ""
    num_parameters: int = 0
    sketch_dim: int | None = None
    log_snr: Float[Tensor, " T"] | None = None

    def __post_init__(self) -> None:
        check_timesteps(self.timesteps, num_timesteps=self.num_timesteps)
        n = len(self.timesteps)
        shape = tuple(self.half_dots.shape)
        if len(shape) != 5 or shape[0] < 1 or shape[1:] != (2, 2, n, n):
            raise ConfigError(f"half_dots: must have shape (c, 2, 2, {n}, {n}), found {shape}")
        if not bool(self.half_dots.isfinite().all()):
            raise ConfigError("half_dots: must be finite, found NaN or infinity")
        if self.log_snr is not None:
            check_log_snr(self.log_snr, num_timesteps=self.num_timesteps)

    @property
    def method(self) -> str:
        """`exact` or `sketch`."""
        return "exact" if self.sketch_dim is None else "sketch"

    @property
    def num_checkpoints(self) -> int:
        """Checkpoints that are averaged."""
        return len(self.half_dots)

    @cached_property
    def plain(self) -> Float[Tensor, "n n"]:
        """Cosine of the mean gradients, averaged over checkpoints: the official definition."""
        return plain_affinity(self.half_dots).mean(0)

    @cached_property
    def corrected(self) -> Float[Tensor, "n n"]:
        """Estimate of the cosine without noise, see `corrected_affinity`.

        Averaged over the checkpoints at which both timesteps have positive split-half products;
        NaN where there is none.
        """
        return corrected_affinity(self.half_dots).nanmean(0)

    @cached_property
    def corrected_standard_error(self) -> Float[Tensor, "n n"]:
        """Approximate standard error of `corrected`, checkpoints taken as independent."""
        errors = corrected_standard_error(self.half_dots)
        counts = (~errors.isnan()).sum(0)
        mean = errors.square().nansum(0).sqrt() / counts.clamp(min=1)
        return torch.where(counts > 0, mean, torch.nan)

    @cached_property
    def reliability(self) -> Float[Tensor, " n"]:
        """Split-half reliability of each gradient, averaged over checkpoints."""
        return split_half_reliability(self.half_dots).mean(0)

    @property
    def sketch_standard_error(self) -> Float[Tensor, "n n"]:
        """Standard error of `plain` from the random projection alone, `(1 - c²) / sqrt(m)`; or 0.

        Checkpoints may share their projection, so it is not made smaller by averaging. For
        `corrected` divide it by the square root of the product of the two reliabilities.
        """
        if self.sketch_dim is None:
            return torch.zeros_like(self.plain)
        error: Tensor = (1 - self.plain.square()) / self.sketch_dim**0.5
        return error

    @property
    def grid_log_snr(self) -> Float[Tensor, " n"] | None:
        """Log-SNR at the timesteps of the grid, if that of the schedule is known."""
        return None if self.log_snr is None else self.log_snr[list(self.timesteps)]

    def reliability_warning(self, *, below: float = 0.8) -> str | None:
        """One sentence that names the timesteps whose reliability is too low; None if none is."""
        return reliability_message(self.timesteps, self.reliability, below=below)

    def save(self, path: str | Path) -> None:
        """Write an `.npz` file, whole or not at all; its arrays are listed at `save_affinity`."""
        save_affinity(self, path)

    @classmethod
    def load(cls, path: str | Path) -> AffinityResult:
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            ConfigError: If there is no such file, it is damaged, or its arrays do not fit.
        """
        stored = load_affinity(path)
        try:
            return cls(*stored)
        except ConfigError as error:
            raise ConfigError(f"affinity: {path} does not fit itself: {error}") from None

    @classmethod
    def mean(cls, results: Sequence[AffinityResult]) -> AffinityResult:
        """Average over checkpoints: cosines are averaged, not dot products, so each counts alike.

        Raises:
            ConfigError: If there is no result, or grid, schedule or method differ between them.
        """
        if not results:
            raise ConfigError("results: at least one is needed, found 0")
        first = results[0]
        for other in results[1:]:
            for name in ("timesteps", "num_timesteps", "num_parameters", "sketch_dim"):
                one, two = getattr(first, name), getattr(other, name)
                if one != two:
                    raise ConfigError(f"results: {name} must be the same, found {one} and {two}")
            if not _same_schedule(first.log_snr, other.log_snr):
                raise ConfigError("results: log_snr must be the same, found different schedules")
        return cls(
            timesteps=first.timesteps,
            num_timesteps=first.num_timesteps,
            half_dots=torch.cat([each.half_dots for each in results]),
            seed=first.seed,
            model=", ".join(dict.fromkeys(each.model for each in results)),
            num_parameters=first.num_parameters,
            sketch_dim=first.sketch_dim,
            log_snr=first.log_snr,
        )


def _same_schedule(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return torch.allclose(one, two, rtol=1e-6, atol=1e-9)
