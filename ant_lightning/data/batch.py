"""The batch that every data module yields."""

from __future__ import annotations

from typing import NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
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


def check_first_images(images: Tensor, *, name: str = "batch.images") -> None:
    """Check the range of the first images of a run; reads two values back from an accelerator.

    Images are in [-1, 1], where the noise levels of training and the clipping of sampling expect
    them. Interpolation overshoots by less than half of the range on either side of an edge, and
    images that are standardised with the mean and deviation of ImageNet go beyond 2.

    Raises:
        ConfigError: If values are outside [-1.5, 1.5].

    Examples:
        >>> import torch
        >>> from ant_lightning import ConfigError
        >>> from ant_lightning.data.batch import check_first_images
        >>> check_first_images(torch.tensor([-1.1, 0.0, 1.0]))
        >>> try:
        ...     check_first_images(torch.tensor([0.0, 255.0]))
        ... except ConfigError as error:
        ...     print(error)
        batch.images: must be in [-1, 1] (or sampling.clip_denoised be false, for what is not pixels), found values from 0 to 255
    """  # noqa: E501 - one line of output
    low, high = (float(each) for each in images.detach().float().aminmax())
    if low < -1.5 or high > 1.5:
        raise ConfigError(
            f"{name}: must be in [-1, 1] (or sampling.clip_denoised be false, for what is not "
            f"pixels), found values from {low:.4g} to {high:.4g}"
        )
    if low >= 0 and 0.5 < high <= 1:
        rank_zero_warn(
            f"{name}: are expected in [-1, 1], and those of the first batch are from {low:.4g} to "
            f"{high:.4g}; if 0 is black, give 2 * images - 1"
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
