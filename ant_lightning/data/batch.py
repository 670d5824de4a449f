"""What every data module yields."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Batch"]


class Batch(NamedTuple):
    """Images of a batch.

    Attributes:
        images: `[b, c, h, w]` float32 in [-1, 1] (or first-stage moments, see `LatentsData`).
        labels: `[b]` int64; zeros for data without classes.
        indices: `[b]` int64, position of each image in its data set: randomness is keyed by it.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
