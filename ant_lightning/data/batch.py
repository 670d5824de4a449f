"""The batch that every data module yields."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError, NonFiniteError


class Batch(NamedTuple):
    """Images with their labels and their positions in the data set.

    Attributes:
        images: `[b, c, h, w]` float32 in [-1, 1] (or first-stage moments, see `LatentsData`).
        labels: `[b]` int64; zeros for data without classes.
        indices: `[b]` int64, position of each image in its data set. Random numbers are keyed by
            it, so that they do not depend on the batch or the rank.
        condition: Named tensors `[b, ...]` that a network is given beside the labels, such as the
            embeddings of captions; empty for none.

    Examples:
        >>> import torch
        >>> from ant_lightning import Batch
        >>> batch = Batch(torch.zeros(2, 3, 8, 8), torch.tensor([0, 4]), torch.tensor([17, 9]))
        >>> batch.labels.tolist()
        [0, 4]
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    condition: dict[str, Tensor] = {}  # noqa: RUF012 - a tuple's; never changed


def check_batch(batch: object) -> None:
    """Check what a loader yields, without reading values back from an accelerator.

    Raises:
        ConfigError: If it is not a `Batch`, or a dtype or shape is wrong.
    """
    if not isinstance(batch, Batch):
        parts = list(map(str, batch)) if isinstance(batch, dict) else []
        if isinstance(batch, tuple | list):
            parts = [type(each).__name__ for each in batch]
        inside = f" of {', '.join(parts)}" if parts else ""
        raise ConfigError(
            "batch: must be an ant_lightning.Batch, so let the data set return "
            f"Batch(image, label, index), found a {type(batch).__name__}{inside}"
        )
    # Only dtypes and shapes: to check values, the host would have to wait for the GPU.
    images, labels, indices, _ = batch
    if not images.is_floating_point():
        raise ConfigError(f"batch.images: must be floating point in [-1, 1], found {images.dtype}")
    for name, each in (("labels", labels), ("indices", indices)):
        whole = not each.is_floating_point() and not each.is_complex()
        if not whole or each.shape != images.shape[:1]:
            raise ConfigError(
                f"batch.{name}: must be one whole number for each of the {len(images)} images, "
                f"found {each.dtype} of shape {list(each.shape)}"
            )


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8, 0 .. 255.

    Raises:
        NonFiniteError: If an image has a NaN or an infinity, which uint8 would hide.
    """
    bad = ~images.flatten(1).isfinite().all(1)
    if bool(bad.any()):
        raise NonFiniteError(
            f"{int(bad.sum())} of {len(images)} images have a NaN or an infinity, so there is "
            "nothing to show, store or score: the network that drew them has diverged"
        )
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
