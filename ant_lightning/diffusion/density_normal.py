"""Densities that are normal in a function of the time: logit-normal and log-normal."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ant_lightning.diffusion.density import Coordinate, Density
from ant_lightning.errors import ConfigError, check_positive

if TYPE_CHECKING:
    from jaxtyping import Float


class _Normal(Density):
    """A normal density of a function of the coordinate; subclasses give the function."""

    def __init__(self, mean: float, std: float) -> None:
        if not math.isfinite(mean):
            raise ConfigError(f"mean: must be finite, found {mean}")
        check_positive(std=std)
        self.mean = mean
        self.std = std

    @abstractmethod
    def _standard(self, z: Tensor) -> Tensor:
        """The standard normal variable at the coordinate z."""

    @abstractmethod
    def _coordinate(self, standard: Tensor) -> Tensor:
        """The inverse of `_standard`."""

    def cdf(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The normal cdf."""
        below: Tensor = torch.special.ndtr(self._standard(z))
        return below

    def quantile(self, q: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The normal quantile."""
        return self._coordinate(torch.special.ndtri(q))

    def prepared(self, edges: Float[Tensor, " T+1"]) -> Float[Tensor, " T+1"]:
        """The standard normal variable at the edges."""
        return self._standard(edges)

    def masses(self, prepared: Float[Tensor, " T+1"]) -> Float[Tensor, " T"]:
        """Differences of the normal cdf."""
        lower, upper, _ = _in_lower_tail(prepared[:-1], prepared[1:])
        masses: Tensor = torch.special.ndtr(upper) - torch.special.ndtr(lower)
        return masses

    def inside(
        self, lower: Float[Tensor, " b"], upper: Float[Tensor, " b"], u: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """The quantile of the normal distribution, restricted to the cells."""
        low, high, flipped = _in_lower_tail(lower, upper)
        # At 0 the quantile of an open cell would be infinite.
        u = u.clamp(min=2**-54)
        u = torch.where(flipped, 1 - u, u)
        start, stop = torch.special.ndtr(low), torch.special.ndtr(high)
        found = torch.special.ndtri(start + u * (stop - start))
        found = torch.minimum(torch.maximum(found, low), high)  # rounding must not leave the cell
        return self._coordinate(torch.where(flipped, -found, found))


def _in_lower_tail(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intervals above 0 mirrored: near 1 the cdf has no digits left, near 0 it keeps them all."""
    flipped = lower > 0
    return torch.where(flipped, -upper, lower), torch.where(flipped, -lower, upper), flipped


class LogitNormal(_Normal):
    """`logit(t)` is normal: mostly the middle of the axis, as SD3 and LightningDiT train.

    t is ours, 1 is noise: a `mean` above 0 draws more noise, as in the paper. (The training scripts
    of diffusers index a descending table with it, so there a mean above 0 draws less noise.)

    Args:
        mean: Mean of `logit(t)`.
        std: Standard deviation of `logit(t)`.

    Raises:
        ConfigError: If `mean` is not finite, or `std` not finite and above 0.

    Reference:
        Esser et al., "Scaling Rectified Flow Transformers", equation 19, arXiv 2403.03206.

    Examples:
        >>> from ant_lightning import FlowMatching, LogitNormal
        >>> process = FlowMatching(density=LogitNormal(0.0, 1.0), num_timesteps=5)
        >>> [round(mass, 3) for mass in process.density.tolist()]
        [0.083, 0.26, 0.315, 0.26, 0.083]
    """

    coordinate: ClassVar[Coordinate | None] = "time"

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__(mean, std)

    def _standard(self, z: Tensor) -> Tensor:
        standard: Tensor = (torch.logit(z) - self.mean) / self.std
        return standard

    def _coordinate(self, standard: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * standard)


class LogNormal(_Normal):
    """`ln sigma` is normal, as EDM trains; the mass outside the axis is in the end cells.

    Args:
        mean: Mean of ln sigma, `P_mean` of EDM.
        std: Standard deviation of ln sigma, `P_std` of EDM.

    Raises:
        ConfigError: If `mean` is not finite, or `std` not finite and above 0.

    Reference:
        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", table 1,
        arXiv 2206.00364.

    Examples:
        >>> from ant_lightning import EDM, LogNormal
        >>> process = EDM(density=LogNormal(-1.2, 1.2), num_timesteps=4)
        >>> [round(mass, 3) for mass in process.density.tolist()]
        [0.024, 0.569, 0.399, 0.007]
    """

    coordinate: ClassVar[Coordinate | None] = "log_sigma"

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        super().__init__(mean, std)

    def prepared(self, edges: Float[Tensor, " T+1"]) -> Float[Tensor, " T+1"]:
        """As in the base class, with the outer edges moved to minus and plus infinity."""
        inner = super().prepared(edges[1:-1])
        infinite = inner.new_tensor([-math.inf, math.inf])
        return torch.cat([infinite[:1], inner, infinite[1:]])

    def _standard(self, z: Tensor) -> Tensor:
        return (z - self.mean) / self.std

    def _coordinate(self, standard: Tensor) -> Tensor:
        return self.mean + self.std * standard
