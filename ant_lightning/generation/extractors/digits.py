"""Features for 8x8 digits: a small CNN trained on their labels, shipped with the package."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from ant_lightning.errors import ConfigError
from ant_lightning.generation.extractors.features import Features, check_images
from ant_lightning.generation.extractors.shipped import ShippedNetwork

__all__ = ["DIGITS_WEIGHTS", "DigitsFeatures", "digits_layers"]

DIGITS_WEIGHTS = Path(__file__).with_name("digits_network.safetensors")


def digits_layers() -> tuple[nn.Sequential, nn.Linear]:
    """The untrained network: ``[n, 1, 8, 8]`` in [-1, 1] to features ``[n, 64]``, and the head.

    SiLU instead of ReLU: no feature can die, so that the covariance of many digits is regular.
    """
    trunk = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 32, 3, padding=1),
            act1=nn.SiLU(),
            conv2=nn.Conv2d(32, 32, 3, padding=1),
            act2=nn.SiLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc=nn.Linear(32 * 4 * 4, 64),
            act3=nn.SiLU(),
        )
    )
    return trunk, nn.Linear(64, 10)


class DigitsFeatures(ShippedNetwork):
    """A CNN of 43,050 parameters on scikit-learn's 8x8 digits: 64 features, 10 class logits.

    Input is uint8 ``[n, 1, 8, 8]``, 0 to 255, of the digits' 0 to 16 by the mapping of the whole
    package: x = digit / 8 - 1 in [-1, 1], then round((x + 1) 127.5). The weights, their held-out
    accuracy and the split that they were trained on are in the file's header (``metadata``);
    ``python -m ant_lightning.generation.extractors.digits_network`` makes the file again.

    Args:
        weights: A safetensors file of this network; null takes the shipped one.

    Raises:
        ConfigError: The file is missing, or its entries are not those of this network.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        path = DIGITS_WEIGHTS if weights is None else Path(weights)
        super().__init__(*digits_layers(), path, what="digits network", name="digits-cnn-64")

    def extract(self, images: Tensor) -> Features:
        """Features ``[n, 64]`` and logits ``[n, 10]`` of uint8 images ``[n, 1, 8, 8]``.

        Raises:
            ConfigError: Another dtype, or another shape than ``[n, 1, 8, 8]``.
        """
        check_images(images, channels=(1,))
        if images.shape[2:] != (8, 8):
            raise ConfigError(f"images must be 8 x 8 digits, got {list(images.shape[2:])}")
        features = self.trunk(images.to(torch.float32) / 127.5 - 1)
        return Features(features, self.head(features))
