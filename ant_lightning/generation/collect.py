"""One pass of images through an extractor, and joining what ranks or batches gave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError
from ant_lightning.generation.extractors.features import FeatureExtractor, Features, check_images

__all__ = ["collect_features", "concatenate_features"]


@torch.no_grad()
def collect_features(
    images: Tensor | Iterable[Tensor], extractor: FeatureExtractor, *, batch_size: int = 100
) -> Features:
    """Pass every image through the extractor once; the result lies on the CPU.

    Autocast is off inside, so that a run in half precision is measured in full precision. To
    share images over ranks, give each rank its own, gather the parts, put them into the order
    of the image index, and score them on any rank: the metrics then see what one rank would.

    Args:
        images: uint8 images ``[n, c, h, w]``, or an iterable of such batches.
        extractor: The network; images are moved to its device.
        batch_size: Images per forward when ``images`` is one tensor.

    Raises:
        ConfigError: No images, another dtype or shape, or features that are not finite.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    state = next(chain(extractor.parameters(), extractor.buffers()), None)
    parts: list[Features] = []
    count = 0
    for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
        if len(batch) == 0:
            continue
        device = batch.device if state is None else state.device
        check_images(batch)
        with torch.autocast(device.type, enabled=False):
            part = extractor.extract(batch.to(device))
        if part.features.shape != (len(batch), extractor.num_features):
            raise ConfigError(
                f"extractor {extractor.name!r} must give features of shape "
                f"{[len(batch), extractor.num_features]}, got {list(part.features.shape)}"
            )
        bad = (~part.features.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise ConfigError(
                f"features must be finite, but extractor {extractor.name!r} gave NaN or an "
                f"infinity for image {count + int(bad[0])}"
            )
        logits = None if part.logits is None else part.logits.float().cpu()
        parts.append(Features(part.features.float().cpu(), logits))
        count += len(batch)
    return concatenate_features(parts)


def concatenate_features(parts: Sequence[Features]) -> Features:
    """Join parts in the order given; logits are kept where every part has them.

    Raises:
        ConfigError: There are no parts, that is, no images.
    """
    if not parts:
        raise ConfigError("images must hold at least one image, got none")
    logits = [part.logits for part in parts if part.logits is not None]
    return Features(
        torch.cat([part.features for part in parts]),
        torch.cat(logits) if len(logits) == len(parts) else None,
    )
