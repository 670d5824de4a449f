"""Distance to the nearest training image: the companion of FID that shows memorisation."""

from __future__ import annotations

from torch import Tensor

from ant_lightning.generation.distances import centre_together, distance_blocks, paired_distances

__all__ = ["nearest_distance"]


def nearest_distance(generated: Tensor, train: Tensor) -> Tensor:
    """Euclidean distance ``[n]`` of each generated row to the nearest row of the training set.

    A model that memorises has a low FID to its training set and distances near 0; compare with
    the distances of held-out images. Works on features and on flattened pixels alike.

    Args:
        generated: ``[n, ...]``, flattened to ``[n, d]``.
        train: ``[m, ...]``, flattened to ``[m, d]``.

    Returns:
        float64 distances; exactly 0 for an exact copy.

    Raises:
        ConfigError: The dimensions differ or a set is empty.
    """
    generated, train = generated.flatten(1), train.flatten(1).to(generated.device)
    near_train, near_generated = centre_together(train, generated)
    squared_nearest = near_generated.new_empty(len(generated))
    num_candidates = min(4, len(train))  # near ties may change places by rounding
    for rows, squared, _ in distance_blocks(near_generated, near_train):
        nearest = squared.topk(num_candidates, dim=1, largest=False).indices
        index = nearest.new_tensor(range(rows.start, rows.stop))
        exact = paired_distances(
            generated, train, index.repeat_interleave(num_candidates), nearest.flatten()
        )
        squared_nearest[rows] = exact.view(-1, num_candidates).amin(1)
    return squared_nearest.sqrt_()
