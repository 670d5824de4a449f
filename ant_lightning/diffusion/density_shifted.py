"""Mode density and shifts: where SD3 puts its training times, and how that follows resolution."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch

from ant_lightning.diffusion.density import Coordinate, Density, Uniform
from ant_lightning.errors import ConfigError, check_at_least, check_positive

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Mode(Density):
    """The mode density of SD3: heavier in the middle (`scale` above 0) or at the ends (below).

    Its quantile is `t(q) = q - scale (cos²(pi (1 - q) / 2) - q)`; `scale = 0` is uniform.

    Args:
        scale: From -1 to `2 / (pi - 2)`, about 1.75, where the quantile still increases.

    Raises:
        ConfigError: If `scale` is outside this range.

    Reference:
        Esser et al., "Scaling Rectified Flow Transformers", equation 20 (with u = 1 - q),
        arXiv 2403.03206.

    Examples:
        >>> from ant_lightning import FlowMatching, Mode
        >>> process = FlowMatching(density=Mode(scale=1.29), num_timesteps=4)
        >>> [round(mass, 3) for mass in process.density.tolist()]
        [0.134, 0.366, 0.366, 0.134]
    """

    coordinate: ClassVar[Coordinate | None] = "time"

    def __init__(self, scale: float = 1.29) -> None:
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ConfigError(f"scale: must be from -1 to 2 / (pi - 2), found {scale}")
        self.scale = scale

    def quantile(self, q: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The inverse cdf."""
        return q - self.scale * (torch.cos(math.pi / 2 * (1 - q)).square() - q)

    def cdf(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Share of the draws below t: the quantile inverted by bisection, to the last bit."""
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.quantile(middle) <= t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(t >= 1, torch.ones_like(t), low)


class Shifted(Density):
    """Another density of t with its times moved: `t = shift t' / (1 + (shift - 1) t')`.

    A shift above 1 moves draws towards the noise. It changes the density, never the cells. The
    sampler has a shift of its own.

    Args:
        density: The density of t'.
        shift: Above 0; 1 changes nothing.

    Raises:
        ConfigError: If `shift` is not above 0, or the density is not one of t.

    Reference:
        Esser et al., "Scaling Rectified Flow Transformers", equation 23, arXiv 2403.03206.

    Examples:
        >>> from ant_lightning import FlowMatching, Shifted, Uniform
        >>> process = FlowMatching(density=Shifted(Uniform(), shift=3.0), num_timesteps=2)
        >>> [round(mass, 3) for mass in process.density.tolist()]  # t = 1/2 is t' = 1/4
        [0.25, 0.75]
    """

    coordinate: ClassVar[Coordinate | None] = "time"

    def __init__(self, density: Density = Uniform(), *, shift: float = 3.0) -> None:
        check_positive(shift=shift)
        _check_shiftable(density)
        self.density = density
        self.shift = shift

    def for_size(self, height: int, width: int) -> Density:
        """The same shift of the inner density for this size."""
        inner = self.density.for_size(height, width)
        return self if inner is self.density else Shifted(inner, shift=self.shift)

    def _before(self, t: Tensor) -> Tensor:
        return t / (self.shift - (self.shift - 1) * t)

    def _after(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def cdf(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The inner density's, before the shift."""
        return self.density.cdf(self._before(z))

    def quantile(self, q: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The inner density's, shifted."""
        return self._after(self.density.quantile(q))

    def prepared(self, edges: Float[Tensor, " T+1"]) -> Float[Tensor, " T+1"]:
        """The inner density's, at the edges before the shift."""
        return self.density.prepared(self._before(edges))

    def masses(self, prepared: Float[Tensor, " T+1"]) -> Float[Tensor, " T"]:
        """The inner density's."""
        return self.density.masses(prepared)

    def inside(
        self, lower: Float[Tensor, " b"], upper: Float[Tensor, " b"], u: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """The inner density's, shifted."""
        return self._after(self.density.inside(lower, upper, u))


class SizeShifted(Density):
    """`Shifted` by the size of what is denoised: `shift = sqrt(height width) / base_size`.

    Larger images need more noise for the same uncertainty. The shift is fixed for a run, by the
    size of the backbone's input; images of another size are refused. In a loop of your own, take
    `process.for_size(height, width)`.

    Args:
        density: The density of t'.
        base_size: Height and width (of the latents, if latents are denoised) that have shift 1.

    Raises:
        ConfigError: If `base_size` is below 1, the density is not one of t, or it is used before
            the size is known.

    Reference:
        Esser et al., "Scaling Rectified Flow Transformers", section 5.3.2, arXiv 2403.03206.

    Examples:
        >>> from ant_lightning import FlowMatching, SizeShifted, Uniform
        >>> process = FlowMatching(density=SizeShifted(Uniform(), base_size=32), num_timesteps=2)
        >>> process.for_size(96, 96).density.tolist()  # shift 3
        [0.25, 0.75]
    """

    coordinate: ClassVar[Coordinate | None] = "time"

    def __init__(self, density: Density = Uniform(), *, base_size: int = 32) -> None:
        check_at_least(1, base_size=base_size)
        _check_shiftable(density)
        self.density = density
        self.base_size = base_size

    def for_size(self, height: int, width: int) -> Density:
        """The shift for this size."""
        inner = self.density.for_size(height, width)
        return Shifted(inner, shift=math.sqrt(height * width) / self.base_size)

    def cdf(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Refused.

        Raises:
            ConfigError: Always: the size is not known.
        """
        raise ConfigError(
            "density: SizeShifted must know the size of the images, found none; take "
            "process.for_size(height, width)"
        )

    def quantile(self, q: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Refused, as `cdf`."""
        return self.cdf(q)


def _check_shiftable(density: Density) -> None:
    if density.coordinate != "time" and type(density) is not Uniform:
        raise ConfigError(
            f"density: must be Uniform or a density of t to be shifted, found "
            f"{type(density).__name__}"
        )
