"""Features of generated images, drawn or stored, that the ranks share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.data.module import to_uint8
from ant_lightning.data.of_trainer import needed_image_data
from ant_lightning.errors import ConfigError
from ant_lightning.generation.collect import collect_features
from ant_lightning.generation.extractors.features import FeatureExtractor, Features
from ant_lightning.generation.gathered import gather_features, with_shape
from ant_lightning.generation.stored_images import StoredImages

if TYPE_CHECKING:
    import lightning as L

    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["class_agreement", "generated_features", "num_generated"]


def num_generated(
    trainer: L.Trainer, pl_module: MultiTaskDiffusion | StoredImages, wanted: int | None
) -> int:
    """How many images are scored: by default as many as are held out, or all stored ones.

    Raises:
        ConfigError: If there are not so many, or a rank would have none.
    """
    if isinstance(pl_module, StoredImages):
        num_images = wanted or pl_module.num_images
        if num_images > pl_module.num_images:
            raise ConfigError(
                f"GenerationMetrics.num_images: {pl_module.path} holds "
                f"{pl_module.num_images} images, found {num_images}"
            )
    else:
        num_images = wanted or len(needed_image_data(trainer, "GenerationMetrics").held_out_images)
    if num_images < trainer.world_size:
        raise ConfigError(
            f"GenerationMetrics.num_images: each of the {trainer.world_size} ranks needs an "
            f"image, found {num_images}"
        )
    return num_images


def generated_features(
    trainer: L.Trainer,
    pl_module: MultiTaskDiffusion | StoredImages,
    extractor: FeatureExtractor,
    *,
    num_images: int,
    batch_size: int,
    seed: int | None,
) -> tuple[Features, tuple[int, int, int]]:
    """Features of the images of all ranks, in the order of their index, and shape of one image.

    Rank r of N draws the images r, r + N, ..
    """
    ranks, rank = trainer.world_size, trainer.global_rank
    if isinstance(pl_module, StoredImages):
        images = pl_module.batches(num_images, first=rank, every=ranks, batch_size=batch_size)
    else:
        mine = range(rank, num_images, ranks)
        batches = (mine[i : i + batch_size] for i in range(0, len(mine), batch_size))
        images = (to_uint8(pl_module.sample(batch, seed=seed)) for batch in batches)
    shapes: list[tuple[int, int, int]] = []
    own = collect_features(with_shape(images, shapes), extractor)
    return gather_features(own, num_images), shapes[0]


def class_agreement(generated: Features, num_classes: int) -> float | None:
    """Share of images whose predicted class is index modulo the number of classes.

    None where the extractor does not classify, or into other classes.
    """
    if generated.logits is None or generated.logits.shape[1] != num_classes:
        return None
    asked = torch.arange(len(generated.logits)) % num_classes
    return float((generated.logits.argmax(1) == asked).double().mean())
