"""The kernel distance (KID): an unbiased squared maximum mean discrepancy of features."""

from __future__ import annotations

from torch import Tensor

from ant_lightning.errors import ConfigError, check_at_least
from ant_lightning.generation.inception_score import MeanAndStd


def kernel_distance(
    real: Tensor,
    generated: Tensor,
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
    seed: int = 2020,
) -> MeanAndStd:
    """KID between real `[n, d]` and generated `[m, d]` features over random subsets.

    With the kernel k(x, y) = (x·y / d + 1)³ and s images per subset

        sum_{i≠j} (k(x_i, x_j) + k(y_i, y_j)) / (s (s - 1)) - 2 / s² sum_{i,j} k(x_i, y_j)

    computed by torch-fidelity in float64 (its command line passes float32 features).

    Args:
        real: Features `[n, d]`.
        generated: Features `[m, d]`.
        subset_size: Images s per subset, drawn without replacement.
        num_subsets: Subsets averaged.
        seed: Seed of the subsets.

    Raises:
        ConfigError: If `subset_size` is not in 2 to min(n, m), `num_subsets` is below 1, or the
            dimensions differ.

    Reference:
        Bińkowski et al., "Demystifying MMD GANs", equation (4), arXiv 1801.01401.

    Examples:
        >>> import torch
        >>> from ant_lightning import kernel_distance
        >>> near, far = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
        >>> round(kernel_distance(near, far, subset_size=2, num_subsets=1).mean, 6)
        9.5
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ConfigError(
            f"real, generated: must have shapes [n, d] and [m, d], found {list(real.shape)} and "
            f"{list(generated.shape)}"
        )
    most = min(len(real), len(generated))
    if not 2 <= subset_size <= most:
        raise ConfigError(
            f"subset_size: must be 2 to the number of images ({most}), found {subset_size}"
        )
    check_at_least(1, num_subsets=num_subsets)
    from torch_fidelity.metric_kid import kid_features_to_metric  # noqa: PLC0415 - other scores do without

    found = kid_features_to_metric(
        generated.double(),
        real.double(),
        kid_subset_size=subset_size,
        kid_subsets=num_subsets,
        rng_seed=seed,
        verbose=False,
    )
    mean, std = (found[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))
    return MeanAndStd(mean, std)
