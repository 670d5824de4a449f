"""The Fréchet distance between two Gaussians: FID, once the features are Inception's."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError
from ant_lightning.generation.moments import GaussianStatistics

__all__ = ["RankDeficientWarning", "frechet_distance", "warn_if_rank_deficient"]


class RankDeficientWarning(UserWarning):
    """There are too few images for the feature dimension: the covariance is singular."""


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    r"""The squared Fréchet (2-Wasserstein) distance between two Gaussians.

    .. math:: |\mu_1 - \mu_2|^2 + tr \Sigma_1 + tr \Sigma_2 - 2 tr (\Sigma_1 \Sigma_2)^{1/2}

    With roots :math:`\Sigma = R R^T` the last trace is the sum of the singular values of
    :math:`R_1^T R_2`. Two regular covariances take their Cholesky factors and the eigenvalues of
    :math:`R_1^T \Sigma_2 R_1`, which is the fastest. A singular one takes ``eigh`` without its
    null space, and the singular values themselves: eigenvalues that should be zero come out at
    1e-16, and their square roots at 1e-8 would add up.

    Args:
        first: Statistics in d dimensions.
        second: Statistics in d dimensions.

    Returns:
        The distance, at least 0, computed in float64.

    Raises:
        ConfigError: The dimensions differ, or a value is not finite.

    Reference:
        Heusel et al., arXiv 1706.08500, equation (6).
    """
    if first.mean.shape != second.mean.shape:
        raise ConfigError(
            f"statistics must have one feature dimension, got {len(first.mean)} and "
            f"{len(second.mean)}"
        )
    device = first.mean.device
    mean_1, cov_1 = first.mean.double(), first.covariance.double()
    mean_2, cov_2 = second.mean.to(device).double(), second.covariance.to(device).double()
    if not all(bool(x.isfinite().all()) for x in (mean_1, cov_1, mean_2, cov_2)):
        raise ConfigError("statistics must be finite, found NaN or an infinity")
    root_1 = _cholesky(cov_1, first.num_samples)
    root_2 = _cholesky(cov_2, second.num_samples)
    if root_1 is not None and root_2 is not None:
        product = root_1.T @ cov_2 @ root_1
        trace_root = torch.linalg.eigvalsh(product).clamp_(min=0).sqrt_().sum()
    else:
        root_1 = _reduced_root(cov_1) if root_1 is None else root_1
        root_2 = _reduced_root(cov_2) if root_2 is None else root_2
        trace_root = torch.linalg.svdvals(root_1.T @ root_2).sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * trace_root
    return max(0.0, float(distance))


def _cholesky(covariance: Tensor, num_samples: int | None) -> Tensor | None:
    """The Cholesky factor, or None where the covariance is, or may be, singular."""
    if num_samples is not None and num_samples <= len(covariance):
        return None
    root, info = torch.linalg.cholesky_ex(covariance)
    # pivots do not reveal the rank: those that should be zero were seen at 4e4 eps, so whatever
    # is small goes the slower way, which is right for every covariance
    floor = 1e-10 * covariance.diagonal().amax()
    return None if int(info) or bool(root.diagonal().square().amin() <= floor) else root


def _reduced_root(covariance: Tensor) -> Tensor:
    """A root ``[d, r]`` of a covariance of rank r."""
    values, vectors = torch.linalg.eigh(covariance)
    # zero eigenvalues of a rounded matrix were seen at 5 eps even in few dimensions
    keep = values > max(len(values), 32) * torch.finfo(torch.float64).eps * values[-1].abs()
    root: Tensor = vectors[:, keep] * values[keep].sqrt()
    return root


def warn_if_rank_deficient(num_samples: int, num_features: int, *, what: str) -> None:
    """Warn that n samples give a covariance of rank at most n - 1 when n <= d.

    FID is then still defined, and larger the smaller n is: only values at one n compare.
    """
    if num_samples <= num_features:
        warnings.warn(
            f"{num_samples} {what} for {num_features} features: the covariance has rank at most "
            f"{num_samples - 1}, and FID is biased upwards; compare at the same number only",
            RankDeficientWarning,
            stacklevel=3,
        )
