"""The Fréchet distance between two Gaussians; with Inception's features it is FID."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError

_CHUNK_ROWS = 1024  # float64 copies stay at 16 MiB for 2048 features


class RankDeficientWarning(UserWarning):
    """The covariance is singular: there are no more images than features."""


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean `[d]` and covariance `[d, d]` (denominator n - 1) of features, both float64.

    Args:
        mean: The mean `[d]`.
        covariance: The covariance `[d, d]`.
        num_samples: Number n of the samples; `None` if unknown, as for a file without it.

    Examples:
        >>> import torch
        >>> from ant_lightning import GaussianStatistics
        >>> gaussian = GaussianStatistics.from_features(torch.tensor([[0.0], [2.0], [4.0]]))
        >>> gaussian.mean.item(), gaussian.covariance.item(), gaussian.num_samples
        (2.0, 4.0, 3)
    """

    mean: Tensor
    covariance: Tensor
    num_samples: int | None = None

    @classmethod
    def from_features(cls, features: Tensor) -> GaussianStatistics:
        """Moments of features `[n, d]`, centred before they are multiplied.

        Raises:
            ConfigError: If there are fewer than two rows.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ConfigError(
                f"features: must have shape [n, d] with n >= 2, found {list(features.shape)}"
            )
        mean = features.mean(0, dtype=torch.float64)
        scatter = mean.new_zeros(len(mean), len(mean))
        for rows in features.split(_CHUNK_ROWS):
            centred = rows.double() - mean
            scatter.addmm_(centred.T, centred)
        return cls(mean, scatter.div_(len(features) - 1), len(features))

    @classmethod
    def from_sums(cls, count: int, total: Tensor, outer: Tensor) -> GaussianStatistics:
        """Moments of n samples from the sum `[d]` and the sum of outer products `[d, d]`.

        Raises:
            ConfigError: If there are fewer than two samples.
        """
        if count < 2:
            raise ConfigError(f"num_samples: must be at least 2 for a covariance, found {count}")
        mean = total / count
        # The subtraction loses digits where the mean is far larger than the spread. Features of
        # networks are not like that, and float64 has 9 digits more than their float32.
        return cls(mean, (outer - count * torch.outer(mean, mean)) / (count - 1), count)


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """The squared Fréchet (2-Wasserstein) distance between two Gaussians.

        |mu_1 - mu_2|² + tr(C_1) + tr(C_2) - 2 tr((C_1 C_2)^(1/2))

    With roots `C = R Rᵀ` the last trace is the sum of the singular values of `R_1ᵀ R_2`. If both
    covariances are regular, R_1 is a Cholesky factor and the trace is the sum of the square roots
    of the eigenvalues of `R_1ᵀ C_2 R_1`, which is fastest. If one is singular, its root comes from
    `eigh` without the null space, and the singular values are computed directly. Eigenvalues that
    should be 0 come out at 1e-16, and many square roots of 1e-8 would add up.

    Args:
        first: Statistics in d dimensions.
        second: Statistics in d dimensions.

    Returns:
        The distance, at least 0, computed in float64.

    Raises:
        ConfigError: If the dimensions differ, or a value is not finite.

    Reference:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
        Equilibrium", equation (6), arXiv 1706.08500.

    Examples:
        >>> import torch
        >>> from ant_lightning import GaussianStatistics, frechet_distance
        >>> narrow = GaussianStatistics(torch.zeros(2), torch.eye(2))
        >>> wide = GaussianStatistics(torch.tensor([3.0, 0.0]), 4 * torch.eye(2))
        >>> round(frechet_distance(narrow, wide), 6)  # 3² + 2 (2 - 1)²
        11.0
    """
    if first.mean.shape != second.mean.shape:
        raise ConfigError(
            f"second: must have {len(first.mean)} features as first, found {len(second.mean)}"
        )
    device = first.mean.device
    mean_1, cov_1 = first.mean.double(), first.covariance.double()
    mean_2, cov_2 = second.mean.to(device).double(), second.covariance.to(device).double()
    if not all(bool(x.isfinite().all()) for x in (mean_1, cov_1, mean_2, cov_2)):
        raise ConfigError("first, second: must be finite, found NaN or an infinity")
    root_1 = _cholesky(cov_1, first.num_samples)
    root_2 = _cholesky(cov_2, second.num_samples)
    if root_1 is not None and root_2 is not None:
        product = root_1.T @ cov_2 @ root_1
        trace_root = torch.linalg.eigvalsh(product).clamp_(min=0).sqrt_().sum()
    else:
        root_1 = _reduced_root(cov_1) if root_1 is None else root_1
        root_2 = _reduced_root(cov_2) if root_2 is None else root_2
        trace_root = torch.linalg.svdvals(root_1.T @ root_2).sum()
    # Equation (6).
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * trace_root
    return max(0.0, float(distance))


def _cholesky(covariance: Tensor, num_samples: int | None) -> Tensor | None:
    """The Cholesky factor, or `None` if the covariance is, or may be, singular."""
    # n centred samples span at most n - 1 dimensions.
    if num_samples is not None and num_samples <= len(covariance):
        return None
    root, info = torch.linalg.cholesky_ex(covariance)
    # Pivots do not reveal the rank: some that should be 0 came out at 4e4 eps. So a covariance
    # with a small pivot goes the slower way, which is right for every covariance.
    floor = 1e-10 * covariance.diagonal().amax()
    return None if int(info) or bool(root.diagonal().square().amin() <= floor) else root


def _reduced_root(covariance: Tensor) -> Tensor:
    """A root `[d, r]` of a covariance of rank r."""
    values, vectors = torch.linalg.eigh(covariance)
    # Eigenvalues that should be 0 came out at 5 eps of the largest even in few dimensions: the
    # usual threshold d eps would keep them, so d counts as at least 32.
    keep = values > max(len(values), 32) * torch.finfo(torch.float64).eps * values[-1].abs()
    root: Tensor = vectors[:, keep] * values[keep].sqrt()
    return root


def warn_if_rank_deficient(gaussian: GaussianStatistics, *, what: str) -> None:
    """Warn if there are n <= d samples: their covariance has rank n - 1 at most.

    FID is still defined then, but it grows as n falls: compare values at the same n only.
    """
    count, num_features = gaussian.num_samples, len(gaussian.mean)
    if count is not None and count <= num_features:
        warnings.warn(
            f"{count} {what} for {num_features} features: the covariance has rank at most "
            f"{count - 1}, and FID is biased upwards; compare at the same number only",
            RankDeficientWarning,
            stacklevel=3,
        )
