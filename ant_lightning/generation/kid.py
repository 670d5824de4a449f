"""The kernel distance (KID): an unbiased squared maximum mean discrepancy of features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ant_lightning.errors import ConfigError
from ant_lightning.generation.inception_score import MeanAndStd

__all__ = ["kernel_distance"]


def kernel_distance(
    real: Tensor,
    generated: Tensor,
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
    seed: int = 2020,
) -> MeanAndStd:
    r"""KID between real ``[n, d]`` and generated ``[m, d]`` features over random subsets.

    With the kernel :math:`\kappa(x, y) = (x \cdot y / d + 1)^3` and s images per subset

    .. math:: \frac{\sum_{i \ne j} \kappa(x_i, x_j) + \kappa(y_i, y_j)}{s (s - 1)}
              - \frac{2}{s^2} \sum_{i, j} \kappa(x_i, y_j).

    Subsets are drawn in torch-fidelity's order, so that one seed gives its value; the kernels
    are float64 where torch-fidelity computes in the features' float32.

    Args:
        real: Features ``[n, d]``.
        generated: Features ``[m, d]``.
        subset_size: Images s per subset, drawn without replacement.
        num_subsets: Subsets averaged.
        seed: Of the draw.

    Raises:
        ConfigError: ``subset_size`` is not in 2 to min(n, m), ``num_subsets`` is below 1, or the
            dimensions differ.

    Reference:
        Bińkowski et al., "Demystifying MMD GANs", arXiv 1801.01401, equation (4).
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ConfigError(
            f"features must have shapes [n, d] and [m, d], got {list(real.shape)} and "
            f"{list(generated.shape)}"
        )
    if not 2 <= subset_size <= min(len(real), len(generated)):
        raise ConfigError(
            f"subset_size must be in 2 to the number of images "
            f"({min(len(real), len(generated))}), got {subset_size}"
        )
    if num_subsets < 1:
        raise ConfigError(f"num_subsets must be at least 1, got {num_subsets}")
    rng = np.random.RandomState(seed)
    values = [
        _squared_discrepancy(*(_draw(features, subset_size, rng) for features in (generated, real)))
        for _ in range(num_subsets)
    ]
    return MeanAndStd(float(np.mean(values)), float(np.std(values)))


def _draw(features: Tensor, size: int, rng: np.random.RandomState) -> Tensor:
    index = torch.from_numpy(rng.choice(len(features), size, replace=False))
    return features[index.to(features.device)].double()


def _squared_discrepancy(x: Tensor, y: Tensor) -> float:
    y = y.to(x.device)
    size, dimension = x.shape
    inner = 0.0
    for a in (x, y):
        kernel = (a @ a.T / dimension + 1) ** 3
        inner += float(kernel.sum() - kernel.trace())
    outer = float(((x @ y.T / dimension + 1) ** 3).sum())
    return inner / (size * (size - 1)) - 2 * outer / size**2
