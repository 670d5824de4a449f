"""Indices and labels of images to sample: accepts the forms a user may write, checks them."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


def as_indices(indices: int | Iterable[int] | Tensor) -> list[int]:
    """The indices of images; a number `n` stands for the first `n`.

    Raises:
        ConfigError: If there is no index, or one is not a whole number of at least 0.
    """
    try:
        every = range(indices) if isinstance(indices, int) else indices
        # Takes Python's, NumPy's and torch's integers; refuses floats, even whole ones.
        found = [operator.index(index) for index in every]
    except TypeError as error:
        raise ConfigError(
            "indices: must be the number of images, or the index of each, found a "
            f"{type(indices).__name__} ({error})"
        ) from error
    if not found or min(found) < 0:
        raise ConfigError(
            f"indices: must be at least one whole number of 0 or more, found {indices}"
        )
    return found


def as_labels(
    labels: int | Iterable[int] | Tensor,
    num_images: int,
    *,
    num_classes: int,
    null_class: int | None,
) -> Tensor:
    """One label for each image, `[n]`.

    Args:
        labels: One label for all images, or one for each.
        num_images: `n`.
        num_classes: Number of classes of the network.
        null_class: The network's null class, also valid as a label.

    Raises:
        ConfigError: If the number of labels is wrong, or the network lacks one of the classes.
    """
    if not num_classes:
        raise ConfigError(f"labels: must be left out for a network without classes, found {labels}")
    try:
        found = torch.as_tensor([labels] * num_images if isinstance(labels, int) else labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"labels: must be whole numbers, found {labels}") from error
    # The null class usually is `num_classes`, but a user's network may choose another number.
    most = max(num_classes - 1, -1 if null_class is None else null_class)
    whole = not found.is_floating_point() and not found.is_complex() and found.dtype != torch.bool
    if found.shape != (num_images,) or not whole or not 0 <= found.min() <= found.max() <= most:
        none = "" if null_class is None else f" ({null_class} draws without a class)"
        raise ConfigError(
            f"labels: must be {num_images} whole numbers from 0 to {most}{none}, one for each "
            f"image, found {labels}"
        )
    return found.long()
