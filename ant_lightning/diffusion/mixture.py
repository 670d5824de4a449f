"""A Gaussian mixture and its exact denoiser: data for which the lowest possible loss is known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class GaussianMixture:
    """`x_start ~ sum_i w_i N(m_i, S_i)` with full covariances, in float64.

    Args:
        weights: `w`, positive with sum 1, `[m]`.
        means: `m`, `[m, d]`.
        covariances: `S`, symmetric positive definite, `[m, d, d]`.

    Raises:
        ConfigError: If a shape, a weight or a covariance breaks these rules.

    Examples:
        >>> import torch
        >>> from ant_lightning import GaussianMixture
        >>> mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
        >>> x_t, half = torch.tensor([[2.0, 0.0]]), torch.tensor([0.5**0.5])
        >>> eps = mixture.denoise(x_t, a=half, s=half)  # E[eps | x_t] = s x_t here
        >>> [round(value, 4) for value in eps[0].tolist()]
        [1.4142, 0.0]
    """

    weights: Float[Tensor, " m"]
    means: Float[Tensor, "m d"]
    covariances: Float[Tensor, "m d d"]
    _values: Float[Tensor, "m d"] = field(init=False, repr=False)
    _axes: Float[Tensor, "m d d"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        m, d = self.means.shape
        if self.weights.shape != (m,) or self.covariances.shape != (m, d, d):
            raise ConfigError(
                f"means: must be [m, d] with weights [m] and covariances [m, d, d], found {[m, d]} "
                f"with {list(self.weights.shape)} and {list(self.covariances.shape)}"
            )
        if bool((self.weights <= 0).any()) or abs(float(self.weights.sum()) - 1) > 1e-6:
            raise ConfigError(f"weights: must be positive with sum 1, found {self.weights}")
        for name in ("weights", "means", "covariances"):
            # The way to set a field of a frozen dataclass.
            object.__setattr__(self, name, getattr(self, name).double())
        values, axes = torch.linalg.eigh(self.covariances)
        if not bool((values > 0).all()):
            raise ConfigError(
                "covariances: must be positive definite, found the eigenvalue "
                f"{float(values.min()):.3g}"
            )
        # Decomposed once for all noise levels: a² S + s² I has the eigenvectors of S.
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_axes", axes)

    def draw(
        self, num_samples: int, *, generator: torch.Generator
    ) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
        """Draw samples `[n, d]` in float64, and the component of each, `[n]`."""
        components = torch.multinomial(
            self.weights, num_samples, replacement=True, generator=generator
        )
        d = self.means.shape[1]
        scaled = torch.randn(num_samples, d, generator=generator, dtype=torch.float64)
        scaled = scaled * self._values.sqrt()[components]
        samples = self.means[components]
        for i in components.unique().tolist():  # one matrix per sample would take n d² numbers
            rows = components == i
            samples[rows] += scaled[rows] @ self._axes[i].mT
        return samples, components

    def denoise(
        self, x_t: Float[Tensor, "b d"], *, a: Float[Tensor, " b"], s: Float[Tensor, " b"]
    ) -> Float[Tensor, "b d"]:
        """`E[eps | x_t]` for `x_t = a x_start + s eps` with standard normal `eps`, in float64.

        Given component i, `x_t ~ N(a m_i, C_i)` with `C_i = a² S_i + s² I`, and
        `E[eps | x_t, i] = s C_i^-1 (x_t - a m_i)`. The mean over components is weighted by their
        posterior probabilities. `a` may be 0 (the result is `x_t / s`); `s` must not be 0.

        No function of `x_t` has a smaller squared error. The excess error of a function f is its
        mean squared distance to this one:
        `E|f - eps|² = E|f - E[eps | x_t]|² + E|E[eps | x_t] - eps|²`.
        """
        x_t, a, s = x_t.double(), a.double(), s.double()
        # In the eigenbasis of S_i, C_i is diagonal: `spread` holds its diagonal, and `along` the
        # coordinates of x_t - a m_i.
        spread = a.square()[:, None, None] * self._values + s.square()[:, None, None]  # [b, m, d]
        centred = x_t[:, None] - a[:, None, None] * self.means
        along = torch.einsum("bmd,mde->bme", centred, self._axes)
        log_density = -0.5 * (along.square() / spread + (2 * math.pi * spread).log()).sum(-1)
        posterior = (self.weights.log() + log_density).softmax(-1)
        shrunk = posterior[..., None] * along / spread
        return s[:, None] * torch.einsum("bme,mde->bd", shrunk, self._axes)
