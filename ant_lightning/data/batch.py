"""What every data module yields."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ant_lightning.errors import ConfigError

__all__ = ["Batch", "check_batch"]


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


def check_batch(batch: object) -> None:
    """Check what a loader yields, without reading values back from an accelerator.

    Raises:
        ConfigError: If it is not a `Batch`, or a dtype or shape is wrong.
    """
    if not isinstance(batch, Batch):
        raise ConfigError(
            "batch: must be an ant_lightning.Batch, so let the data set return "
            f"Batch(image, label, index), found a {type(batch).__name__} {_inside(batch)}".rstrip()
        )
    images, labels, indices = batch
    if not images.is_floating_point():
        raise ConfigError(f"batch.images: must be floating point in [-1, 1], found {_kind(images)}")
    for name, each in (("labels", labels), ("indices", indices)):
        whole = not each.is_floating_point() and not each.is_complex()
        if not whole or each.shape != images.shape[:1]:
            raise ConfigError(
                f"batch.{name}: must be one whole number for each of the {len(images)} images, "
                f"found {_kind(each)} of shape {list(each.shape)}"
            )


def _inside(batch: object) -> str:
    """What a tuple, a list or a dictionary holds."""
    if isinstance(batch, dict):
        return f"of {', '.join(map(str, batch))}"
    if isinstance(batch, tuple | list):
        return f"of {', '.join(type(each).__name__ for each in batch)}"
    return ""


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
