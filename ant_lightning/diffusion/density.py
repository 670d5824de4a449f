"""How often training draws each cell of the noise axis, and the times inside a cell."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float

__all__ = ["Coordinate", "Density", "Table", "Uniform"]

Coordinate = Literal["time", "log_sigma"]


class Density(ABC):
    """A density over the noise axis: the mass of each cell, and its inverse cdf inside a cell.

    The coordinate z of the axis is t in [0, 1] (1 is noise) for `FlowMatching`, `t / T` for
    `DiscreteDiffusion`, and ln sigma for `EDM`.

    A subclass implements `masses` and `inside`.

    Attributes:
        coordinate: The coordinate that the density is defined on; `None` for any.

    Examples:
        >>> import torch
        >>> from ant_lightning import Density, FlowMatching
        >>> class Ramp(Density):  # density 2 t, cdf t²
        ...     coordinate = "time"
        ...     def masses(self, edges):
        ...         return edges.square().diff()
        ...     def inside(self, lower, upper, u):
        ...         return (lower.square() + u * (upper.square() - lower.square())).sqrt()
        >>> FlowMatching(density=Ramp(), num_timesteps=2).density.tolist()
        [0.25, 0.75]
    """

    coordinate: ClassVar[Coordinate | None] = None

    @abstractmethod
    def masses(self, edges: Float[Tensor, " T+1"]) -> Float[Tensor, " T"]:
        """Mass of each cell, from the exact cdf; need not sum to 1."""

    @abstractmethod
    def inside(
        self, lower: Float[Tensor, " b"], upper: Float[Tensor, " b"], u: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """The inverse cdf at `u` in [0, 1) of the density restricted to `[lower, upper]`."""

    def for_size(self, height: int, width: int) -> Density:
        """The density for images of this size; only a shift by resolution depends on it."""
        return self

    def opened(self, edges: Float[Tensor, " T+1"]) -> Float[Tensor, " T+1"]:
        """The edges, with the outer ones moved to where the density ends."""
        return edges

    def checked_masses(
        self, edges: Float[Tensor, " T+1"], *, coordinate: Coordinate
    ) -> Float[Tensor, " T"]:
        """The masses of the cells, normalised to the sum 1.

        Raises:
            ConfigError: If the density has another coordinate, or a mass is negative, not finite,
                or all are 0.
        """
        if self.coordinate not in (None, coordinate):
            names = {"time": "t in [0, 1]", "log_sigma": "ln sigma"}
            raise ConfigError(
                f"density: must be a density of {names[coordinate]} for this process, found "
                f"{type(self).__name__}, one of {names[self.coordinate]}"  # type: ignore[index]
            )
        masses = self.masses(edges)
        if not bool((masses >= 0).all()) or not 0 < float(masses.sum()) < math.inf:
            raise ConfigError(
                f"density: every mass must be finite and at least 0, with a sum above 0, found "
                f"{type(self).__name__} with masses from {float(masses.min())} to "
                f"{float(masses.max())}"
            )
        return masses / masses.sum()


class Uniform(Density):
    """Every cell is drawn equally often, and every place inside a cell.

    This is uniform in t for `DiscreteDiffusion` and `FlowMatching`, in ln sigma for `EDM`.

    Examples:
        >>> from ant_lightning import FlowMatching, Uniform
        >>> FlowMatching(density=Uniform(), num_timesteps=4).density.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    def masses(self, edges: Float[Tensor, " T+1"]) -> Float[Tensor, " T"]:
        """1 for each cell."""
        return torch.ones_like(edges[1:])

    def inside(
        self, lower: Float[Tensor, " b"], upper: Float[Tensor, " b"], u: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """`lower + u (upper - lower)`."""
        return lower + u * (upper - lower)


class Table(Uniform):
    """Cells are drawn in proportion to given numbers, and uniformly inside a cell.

    Args:
        weights: One number for each cell, cell 0 (the least noise) first; finite, at least 0.

    Raises:
        ConfigError: If a number is negative or not finite, or all are 0; in a process, if there is
            not one for each cell.

    Examples:
        >>> from ant_lightning import FlowMatching, Table
        >>> FlowMatching(density=Table([1, 3]), num_timesteps=2).density.tolist()
        [0.25, 0.75]
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = tuple(float(weight) for weight in weights)
        wrong = [each for each in self.weights if not 0 <= each < math.inf]
        if wrong or not sum(self.weights) > 0:
            found = wrong[0] if wrong else "a sum of 0"
            raise ConfigError(
                f"weights: each must be finite and at least 0, with a sum above 0, found {found}"
            )

    def masses(self, edges: Float[Tensor, " T+1"]) -> Float[Tensor, " T"]:
        """The given numbers.

        Raises:
            ConfigError: If there is not one for each cell.
        """
        if len(self.weights) != len(edges) - 1:
            raise ConfigError(
                f"weights: must be {len(edges) - 1}, one for each cell, found {len(self.weights)}"
            )
        return torch.tensor(self.weights, dtype=torch.float64)
