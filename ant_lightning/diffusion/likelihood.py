"""Elementwise Gaussian likelihoods, the parts of the variational bound."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["discretized_gaussian_log_likelihood", "normal_kl"]


def normal_kl(
    mean1: Float[Tensor, "b ..."],
    log_variance1: Float[Tensor, "b ..."],
    mean2: Float[Tensor, "b ..."],
    log_variance2: Float[Tensor, "b ..."],
) -> Float[Tensor, "b ..."]:
    """KL divergence of N(mean1, exp(log_variance1)) from N(mean2, exp(log_variance2)), in nats.

    `½ (lv2 - lv1 - 1 + exp(lv1 - lv2) + (m1 - m2)² exp(-lv2))`.
    """
    difference = log_variance1 - log_variance2
    distance = (mean1 - mean2).square() * torch.exp(-log_variance2)
    # expm1 keeps the digits where the two variances nearly agree, at high noise.
    return 0.5 * (torch.expm1(difference) - difference + distance)


def _normal_cdf(x: Tensor) -> Tensor:
    """Standard normal distribution function, by its usual tanh approximation.

    The published bounds use this approximation, so the exact erf would not agree with them.
    """
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


def discretized_gaussian_log_likelihood(
    x: Float[Tensor, "b ..."], *, mean: Float[Tensor, "b ..."], log_scale: Float[Tensor, "b ..."]
) -> Float[Tensor, "b ..."]:
    """Log-probability, in nats, of the 8-bit bin of x under N(mean, exp(log_scale)²).

    x holds pixels in [-1, 1]; a bin is 2/255 wide and those at -1 and 1 are open outwards.

    Reference: Ho et al., arXiv 2006.11239, equation 13.
    """
    inverse_scale = torch.exp(-log_scale)
    upper = _normal_cdf(inverse_scale * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse_scale * (x - mean - 1 / 255))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    # The clamp keeps the logarithm, and its gradient, finite where the bin has no mass.
    return inside.clamp(min=1e-12).log()
