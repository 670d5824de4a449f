"""Features of images that ranks share, and statistics of real images: made once, then cached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ant_lightning.files.identity import tensors_digest
from ant_lightning.generation.collect import collect_features
from ant_lightning.generation.extractors.features import FeatureExtractor, Features
from ant_lightning.generation.reference import ReferenceStatistics
from ant_lightning.generation.reference_cache import cached_reference, reference_fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from ant_lightning.data.loader import ImageDataset
    from ant_lightning.data.module import ImageDataModule

__all__ = ["gather_features", "real_statistics", "with_shape"]


def gather_features(own: Features, num_images: int) -> Features:
    """Features of all ranks in the order of the image index; rank r of N had r, r + N, ..."""
    ranks = _world_size()
    if ranks == 1:
        return own
    parts: list[Features] = [own] * ranks
    dist.all_gather_object(parts, own)
    order = torch.cat([torch.arange(rank, num_images, ranks) for rank in range(ranks)]).argsort()
    features = torch.cat([part.features for part in parts])[order]
    if own.logits is None:
        return Features(features, None)
    return Features(features, torch.cat([part.logits for part in parts])[order])  # type: ignore[misc]


def real_statistics(
    data: ImageDataModule,
    dataset: ImageDataset,
    extractor: FeatureExtractor,
    *,
    cache_dir: Path | None,
) -> ReferenceStatistics:
    """Statistics and features of real images; ranks share the work.

    Args:
        data: Whose pixels.
        dataset: Its training or its held-out images.
        extractor: Gives the features.
        cache_dir: Where they are kept under a fingerprint of images and extractor; None for
            nowhere.
    """
    if cache_dir is None:
        return _compute(data, dataset, extractor)
    network = tensors_digest([*extractor.parameters(), *extractor.buffers()])
    fingerprint = reference_fingerprint(data.fingerprint(dataset), extractor.name, network)

    def compute() -> ReferenceStatistics:
        return _compute(data, dataset, extractor)

    # Ranks compute together, so they must agree on whether to: one may not see another's disk.
    if _everywhere((cache_dir / f"{fingerprint}.npz").exists()):
        return cached_reference(cache_dir, fingerprint, compute)
    statistics = compute()
    if _rank() == 0:
        cached_reference(cache_dir, fingerprint, lambda: statistics)
    return replace(statistics, fingerprint=fingerprint)


def with_shape(images: Iterable[Tensor], seen: list[tuple[int, int, int]]) -> Iterator[Tensor]:
    """The same batches; `(c, h, w)` of each is added to `seen` if it is not the last one's."""
    for batch in images:
        channels, height, width = batch.shape[1:]
        if not seen or seen[-1] != (channels, height, width):
            seen.append((channels, height, width))
        yield batch


def _compute(
    data: ImageDataModule, dataset: ImageDataset, extractor: FeatureExtractor
) -> ReferenceStatistics:
    shapes: list[tuple[int, int, int]] = []
    pixels = data.pixels(dataset, first=_rank(), every=_world_size())
    own = collect_features(with_shape(pixels, shapes), extractor)
    features = gather_features(own, len(dataset)).features
    return ReferenceStatistics.from_features(
        features, extractor=extractor.name, image_shape=shapes[0]
    )


def _everywhere(here: bool) -> bool:
    if _world_size() == 1:
        return here
    answers = [here] * _world_size()
    dist.all_gather_object(answers, here)
    return all(answers)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world_size() > 1 else 0
