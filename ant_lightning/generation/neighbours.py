"""Nearest neighbours of features: precision, recall, and distance to the training images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError

_BLOCK_ELEMENTS = 4_000_000  # 32 MB of float64; a few such blocks exist at a time


NUM_NEIGHBOURS = 3  # the k of the papers and of the official evaluators


class PrecisionRecall(NamedTuple):
    """Share of generated images in the real manifold, and of real ones in the generated one."""

    precision: float
    recall: float


def precision_recall(
    real: Tensor, generated: Tensor, *, k: int = NUM_NEIGHBOURS
) -> PrecisionRecall:
    """Precision and recall of generated features against real ones, by torch-fidelity in float64.

    Every point of a set is the centre of a closed ball that reaches to its k-th nearest neighbour
    in the set, itself not counted. The manifold of the set is the union of these balls. Precision
    is the share of generated points inside the real manifold, recall the share of real points
    inside the generated one. The official evaluator computes distances in float16.

    Args:
        real: Features `[n, d]`.
        generated: Features `[m, d]`.
        k: The neighbour that sets the radius.

    Raises:
        ConfigError: If `k` is not in 1 to min(n, m) - 1, or the dimensions differ.

    Reference:
        Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative
        Models", equations (1) and (2), arXiv 1904.06991.

    Examples:
        >>> import torch
        >>> from ant_lightning import precision_recall
        >>> real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
        >>> generated = torch.tensor([[0.5], [1.5], [30.0], [40.0]])
        >>> precision_recall(real, generated, k=1)
        PrecisionRecall(precision=0.5, recall=0.75)
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ConfigError(
            f"real, generated: must have shapes [n, d] and [m, d], found {list(real.shape)} and "
            f"{list(generated.shape)}"
        )
    fewest = min(len(real), len(generated))
    if not 1 <= k < fewest:
        raise ConfigError(
            f"k: must be at least 1 and less than the number of images ({fewest}), found {k}"
        )
    from torch_fidelity.metric_prc import prc_features_to_metric  # noqa: PLC0415

    found = prc_features_to_metric(
        generated.double(),
        real.double(),
        prc_neighborhood=k,
        prc_batch_size=max(1, _BLOCK_ELEMENTS // max(len(real), len(generated))),
        save_cpu_ram=True,
        verbose=False,
    )
    # torch-fidelity averages in float32: round to a whole number of images.
    precision = round(found["precision"] * len(generated)) / len(generated)
    return PrecisionRecall(precision, round(found["recall"] * len(real)) / len(real))


def nearest_distance(generated: Tensor, train: Tensor) -> Tensor:
    """Euclidean distance `[n]` of each generated image to the nearest training image.

    A model that memorises has a low FID to its training images and distances near 0. Compare with
    the distances of held-out images. Features and pixels both work.

    Args:
        generated: `[n, ...]`, flattened to `[n, d]`.
        train: `[m, ...]`, flattened to `[m, d]`.

    Returns:
        float64 distances; exactly 0 for an exact copy.

    Raises:
        ConfigError: If the dimensions differ or a set is empty.

    Examples:
        >>> import torch
        >>> from ant_lightning import nearest_distance
        >>> nearest_distance(torch.tensor([[0.0, 3.0]]), torch.tensor([[4.0, 0.0], [9.0, 9.0]]))
        tensor([5.], dtype=torch.float64)
    """
    generated, train = generated.flatten(1).double(), train.flatten(1).to(generated.device).double()
    if generated.shape[1] != train.shape[1] or not len(generated) or not len(train):
        raise ConfigError(
            f"train: must have shape [m, {generated.shape[1]}] with m >= 1 as the generated "
            f"images, found {list(train.shape)}"
        )
    nearest = []
    # `cdist` computes |a|² + |b|² - 2 a·b, whose rounding may swap near ties: keep the 4 nearest.
    num_candidates = min(4, len(train))
    for rows in generated.split(max(1, _BLOCK_ELEMENTS // max(len(train), 4 * train.shape[1]))):
        index = torch.cdist(rows, train).topk(num_candidates, largest=False).indices
        # Recomputed from differences, so that a copy has distance 0 exactly.
        nearest.append((rows[:, None] - train[index]).square().sum(2).amin(1))
    return torch.cat(nearest).sqrt_()
