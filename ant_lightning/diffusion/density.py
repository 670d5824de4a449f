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

Coordinate = Literal["time", "log_sigma"]


class Density(ABC):
    """How often training draws each place on the noise axis: an exact cdf and its inverse.

    The coordinate z of the axis is t in [0, 1] (1 is noise) for `FlowMatching`, `t / T` for
    `DiscreteDiffusion`, and ln sigma for `EDM`. The mass of a cell is the difference of the cdf at
    its edges; a time inside it is the quantile of a number between these two values.

    A subclass implements `cdf` and `quantile`.

    Attributes:
        coordinate: The coordinate that the density is defined on; `None` for any.

    Examples:
        >>> from ant_lightning import Density, FlowMatching
        >>> class Ramp(Density):  # density 2 t
        ...     coordinate = "time"
        ...     def cdf(self, z):
        ...         return z.square()
        ...     def quantile(self, q):
        ...         return q.sqrt()
        >>> FlowMatching(density=Ramp(), num_timesteps=2).density.tolist()
        [0.25, 0.75]
    """

    coordinate: ClassVar[Coordinate | None] = None

    @abstractmethod
    def cdf(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Mass below the coordinate z."""

    @abstractmethod
    def quantile(self, q: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The inverse of `cdf`."""

    def for_size(self, height: int, width: int) -> Density:
        """The density for images of this size; only a shift by resolution depends on it."""
        return self

    def prepared(self, edges: Float[Tensor, " T+1"]) -> Float[Tensor, " T+1"]:
        """What `masses` and `inside` need of the edges of the cells, computed once: the cdf."""
        return self.cdf(edges)

    def masses(self, prepared: Float[Tensor, " T+1"]) -> Float[Tensor, " T"]:
        """Mass of each cell; need not sum to 1."""
        return prepared.diff()

    def inside(
        self, lower: Float[Tensor, " b"], upper: Float[Tensor, " b"], u: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """The inverse cdf at `u` in [0, 1) of the density restricted to cells.

        Args:
            lower: `prepared` at the lower edge of each cell.
            upper: `prepared` at its upper edge.
            u: Places inside the cells.
        """
        return self.quantile(lower + u * (upper - lower))

    def on_cells(
        self, edges: Float[Tensor, " T+1"], *, coordinate: Coordinate
    ) -> tuple[Float[Tensor, " T+1"], Float[Tensor, " T"]]:
        """What `prepared` returns, and the masses of the cells, normalised to the sum 1.

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
        prepared = self.prepared(edges)
        masses = self.masses(prepared)
        if not bool((masses >= 0).all()) or not 0 < float(masses.sum()) < math.inf:
            raise ConfigError(
                f"density: every mass must be finite and at least 0, with a sum above 0, found "
                f"{type(self).__name__} with masses from {float(masses.min())} to "
                f"{float(masses.max())}"
            )
        return prepared, masses / masses.sum()


class Uniform(Density):
    """Every cell is drawn equally often, and every place inside a cell.

    This is uniform in t for `DiscreteDiffusion` and `FlowMatching`, in ln sigma for `EDM`.

    Examples:
        >>> from ant_lightning import FlowMatching, Uniform
        >>> FlowMatching(density=Uniform(), num_timesteps=4).density.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    def cdf(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """z itself: the mass of an interval is its length, in the units of the coordinate."""
        return z

    def quantile(self, q: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """q itself."""
        return q

    def on_cells(
        self, edges: Float[Tensor, " T+1"], *, coordinate: Coordinate
    ) -> tuple[Float[Tensor, " T+1"], Float[Tensor, " T"]]:
        """As in the base class; cells have exactly the same mass, whatever their edges round to."""
        equal = torch.full_like(edges[1:], 1 / (len(edges) - 1))
        return edges, equal


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

    def on_cells(
        self, edges: Float[Tensor, " T+1"], *, coordinate: Coordinate
    ) -> tuple[Float[Tensor, " T+1"], Float[Tensor, " T"]]:
        """The edges, and the given numbers with the sum 1.

        Raises:
            ConfigError: If there is not one for each cell.
        """
        if len(self.weights) != len(edges) - 1:
            raise ConfigError(
                f"weights: must be {len(edges) - 1}, one for each cell, found {len(self.weights)}"
            )
        masses = torch.tensor(self.weights, dtype=torch.float64)
        return edges, masses / masses.sum()
