"""The interface of feature extractors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ant_lightning.errors import ConfigError, check_at_least

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self


class Features(NamedTuple):
    """Features `[n, d]` of n images and, if the network classifies, logits `[n, c]`.

    Examples:
        >>> import torch
        >>> from ant_lightning import Features
        >>> Features(torch.zeros(2, 1)).logits is None
        True
    """

    features: Tensor
    logits: Tensor | None = None


class FeatureExtractor(nn.Module, ABC):
    """Base of every extractor: uint8 images `[n, c, h, w]` in, float32 features `[n, d]` out.

    A subclass implements `extract`. The module is frozen and stays in evaluation mode, also when
    the module that holds it is put into training mode. `forward` returns the features alone and
    `num_features` is their number, so torchmetrics' metrics accept an extractor as `feature`.

    Attributes:
        title: The network in words, for the lines of commands; by default the name of the class.

    Args:
        num_features: Number d of the features.
        name: Identifies network and weights; cached statistics are kept under it.

    Examples:
        >>> import torch
        >>> from ant_lightning import FeatureExtractor, Features
        >>> class MeanColour(FeatureExtractor):
        ...     def __init__(self):
        ...         super().__init__(num_features=3, name="mean-colour")
        ...
        ...     def extract(self, images):
        ...         return Features(images.float().mean((2, 3)))
        >>> MeanColour()(torch.full((2, 3, 8, 8), 7, dtype=torch.uint8))
        tensor([[7., 7., 7.],
                [7., 7., 7.]])
    """

    title: ClassVar[str] = ""

    def __init__(self, *, num_features: int, name: str) -> None:
        super().__init__()
        check_at_least(1, num_features=num_features)
        self.num_features = num_features
        self.name = name

    @abstractmethod
    def extract(self, images: Tensor) -> Features:
        """Features and logits of uint8 images `[n, c, h, w]`, from one forward pass."""

    def forward(self, images: Tensor) -> Tensor:
        """Features `[n, d]` float32 of uint8 images `[n, c, h, w]`.

        Raises:
            ConfigError: If the images are not a uint8 tensor of four dimensions.
        """
        check_images(images)
        return self.extract(images).features

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a metric must not change with the mode of its owner."""
        del mode
        return super().train(False)


class ModuleFeatures(FeatureExtractor):
    """Any module as an extractor: it maps uint8 images `[n, c, h, w]` to `[n, d]`.

    Args:
        module: The network; its output is flattened to `[n, d]` and cast to float32.
        num_features: Number d of the features.
        name: See `FeatureExtractor`; change it when the weights change.

    Examples:
        >>> import torch
        >>> from ant_lightning import ModuleFeatures
        >>> pixels = ModuleFeatures(torch.nn.Identity(), num_features=2, name="pixels")
        >>> pixels(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
        tensor([[  0., 255.]])
    """

    def __init__(self, module: nn.Module, *, num_features: int, name: str) -> None:
        super().__init__(num_features=num_features, name=name)
        self.module = module.eval().requires_grad_(False)

    def extract(self, images: Tensor) -> Features:
        """Features of uint8 images `[n, c, h, w]`; no logits."""
        return Features(self.module(images).flatten(1).float())


def check_images(
    images: Tensor, *, channels: Sequence[int] = (1, 3), extractor: str = "the extractor"
) -> None:
    """Check that images are a uint8 batch `[n, c, h, w]` with an allowed number of channels.

    Raises:
        ConfigError: If they have another dtype, shape or number of channels.
    """
    if images.dtype != torch.uint8:
        raise ConfigError(f"images: must be uint8 (0 to 255), found {images.dtype}")
    if images.ndim != 4:
        raise ConfigError(f"images: must have shape [n, c, h, w], found {list(images.shape)}")
    if images.shape[1] not in channels:
        allowed = " or ".join(map(str, channels))
        raise ConfigError(
            f"images: must have {allowed} channels for {extractor}, found {images.shape[1]}"
        )
