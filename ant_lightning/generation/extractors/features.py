"""What turns images into features: the interface of every extractor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "FeatureExtractor",
    "Features",
    "ModuleFeatures",
    "check_images",
]


class Features(NamedTuple):
    """Features ``[n, d]`` of n images and, where the network classifies, logits ``[n, c]``."""

    features: Tensor
    logits: Tensor | None = None


class FeatureExtractor(nn.Module, ABC):
    """Base of every extractor: uint8 images ``[n, c, h, w]`` in, float32 features ``[n, d]`` out.

    A subclass implements `extract`, which gives features and logits of one forward. The module
    is frozen and stays in evaluation mode, whatever the module that holds it is set to. As
    ``forward`` gives the features alone and ``num_features`` says their dimension, an extractor
    is also a valid ``feature`` of torchmetrics' metrics.

    Args:
        num_features: The dimension d of the features.
        name: Identifies network and weights; it enters the fingerprints of cached statistics.
    """

    num_features: int
    name: str

    def __init__(self, *, num_features: int, name: str) -> None:
        super().__init__()
        if num_features < 1:
            raise ConfigError(f"num_features must be at least 1, got {num_features}")
        self.num_features = num_features
        self.name = name

    @abstractmethod
    def extract(self, images: Tensor) -> Features:
        """Features and logits of uint8 images ``[n, c, h, w]``, from one forward."""

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[n, d]`` float32 of uint8 images ``[n, c, h, w]``.

        Raises:
            ConfigError: The images are not a uint8 tensor of four dimensions.
        """
        check_images(images)
        return self.extract(images).features

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a metric must not change with the mode of its owner."""
        del mode
        return super().train(False)


class ModuleFeatures(FeatureExtractor):
    """Any module as an extractor: it maps uint8 images ``[n, c, h, w]`` to ``[n, d]``.

    Args:
        module: The network; its output is flattened to ``[n, d]`` and cast to float32.
        num_features: The dimension d.
        name: See `FeatureExtractor`; change it when the weights change.
    """

    def __init__(self, module: nn.Module, *, num_features: int, name: str) -> None:
        super().__init__(num_features=num_features, name=name)
        self.module = module.eval().requires_grad_(False)

    def extract(self, images: Tensor) -> Features:
        """Features of uint8 images ``[n, c, h, w]``; no logits."""
        return Features(self.module(images).flatten(1).float())


def check_images(images: Tensor, *, channels: Sequence[int] = (1, 3)) -> None:
    """Refuse what is not a uint8 batch ``[n, c, h, w]`` with an allowed number of channels."""
    if images.dtype != torch.uint8:
        raise ConfigError(f"images must be uint8 (0 to 255), got {images.dtype}")
    if images.ndim != 4:
        raise ConfigError(f"images must have shape [n, c, h, w], got {list(images.shape)}")
    if images.shape[1] not in channels:
        allowed = " or ".join(map(str, channels))
        raise ConfigError(f"images must have {allowed} channels, got {images.shape[1]}")
