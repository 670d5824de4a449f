"""Classes of real images: a warning for empty ones, and images of each class for a grid."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.data.dataset import ImageDataset
    from ant_lightning.data.module import ImageDataModule


class EmptyClassWarning(UserWarning):
    """A class of the model has no real image."""


def warn_of_empty_classes(data: ImageDataModule, num_classes: int) -> None:
    """Warn of classes without a training or a held-out image, naming the first eight.

    All classes are generated equally often, so a class without real images raises FID through no
    fault of the model.

    Args:
        data: The data module. A data set whose labels are known only after loading is not checked.
        num_classes: Number of the model's classes; below 2 nothing is checked.
    """
    for kind, dataset, why in (
        ("training", data.train_images, "the model cannot learn what it is asked to draw"),
        ("held-out", data.held_out_images, "they are compared with images of other classes"),
    ):
        # Data sets that read the label together with the image have no `labels`.
        labels: Tensor | None = getattr(dataset, "labels", None)
        if labels is None or num_classes < 2:
            continue
        present = set(labels.tolist())
        empty = [str(each) for each in range(num_classes) if each not in present]
        if empty:
            names = ", ".join([*empty[:8], "..."] if len(empty) > 8 else empty)
            warnings.warn(
                f"data: {len(empty)} of {num_classes} classes have no {kind} image (class "
                f"{names}): {why}",
                EmptyClassWarning,
                stacklevel=2,
            )


def images_by_class(
    dataset: ImageDataset, num_images: int, *, num_classes: int
) -> list[int | None]:
    """Positions of images of classes 0, 1, ..., k - 1, 0, 1, ...; `None` for a class without any.

    If labels are known only after loading, the first `10 num_images` images are searched.
    """
    labels: Tensor | None = getattr(dataset, "labels", None)
    if labels is None:
        first = list(range(min(len(dataset), 10 * num_images)))
        labels = dataset.load(first, epoch=None).labels
    positions = [torch.nonzero(labels == c).flatten().tolist() for c in range(num_classes)]
    chosen: list[int | None] = []
    for i in range(num_images):
        own = positions[i % num_classes]
        # Another image of the class in every round; once all were used, they repeat.
        chosen.append(own[(i // num_classes) % len(own)] if own else None)
    return chosen
