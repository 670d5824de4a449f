"""Statistics of real images: computed by all ranks together, then cached."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torchmetrics import MinMetric

from ant_lightning.data.dataset import CHUNK
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.identity import tensors_digest
from ant_lightning.generation.features import ImageFeatures
from ant_lightning.generation.statistics import ImageStatistics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from ant_lightning.data.dataset import ImageDataset
    from ant_lightning.generation.extractor import FeatureExtractor


def real_statistics(
    dataset: ImageDataset,
    extractor: FeatureExtractor,
    *,
    cache_dir: Path | None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> ImageStatistics:
    """Statistics and features of real images; ranks share the work.

    Args:
        dataset: The training or the held-out images.
        extractor: Extractor of the features.
        cache_dir: Folder of the cache, where a file is named by a fingerprint of pixels, extractor
            and weights; `None` for no cache. Processes may share it: a file is written whole or not
            at all, and the statistics of a damaged file are computed again.
        device: Device of the extractor.
        on_progress: Called with the number of images done, of all ranks, and of all images.

    Raises:
        ConfigError: If there are fewer images than ranks.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if len(dataset) < ranks:
        raise ConfigError(f"data: each of {ranks} ranks needs a real image, found {len(dataset)}")
    path, fingerprint, cached = None, "", None
    if cache_dir is not None:
        network = tensors_digest([*extractor.parameters(), *extractor.buffers()])
        depends_on = (dataset.fingerprint(), extractor.name, network)
        # The text that 0.1 hashed: equal images and extractors keep their file names.
        text = "".join(f"str {len(part)} {part};" for part in depends_on)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:32]
        path = cache_dir / f"{fingerprint}.safetensors"
        cached = _load(path, fingerprint)
    # Ranks may have separate disks. Computing is collective, so all compute if one lacks the file:
    # the minimum over ranks of 1 (has the file) and 0.
    on_all_ranks = MinMetric().to(device)
    on_all_ranks.update(float(cached is not None))
    if on_all_ranks.compute() == 1 and cached is not None:
        return cached
    images = ImageFeatures(extractor).to(device)
    mine = range(rank, len(dataset), ranks)
    for start in range(0, len(mine), CHUNK):
        if on_progress is not None:
            on_progress(start * ranks, len(dataset))
        images.update(dataset.pixels(mine[start : start + CHUNK]))
    found = images.compute()
    if path is not None and rank == 0:
        found.save(path, fingerprint=fingerprint)
    return found


def _load(path: Path, fingerprint: str) -> ImageStatistics | None:
    """The statistics in a cache file; `None` if it is missing or damaged."""
    if path.exists():
        try:
            return ImageStatistics.load(path, fingerprint=fingerprint)
        except FileError as error:
            rank_zero_warn(f"statistics of real images are computed again: {error}", stacklevel=3)
    elif path.with_suffix(".npz").exists():
        rank_zero_warn(
            f"statistics of real images are computed again as {path}: the .npz beside it was "
            "written by ant_lightning 0.1",
            stacklevel=3,
        )
    return None
