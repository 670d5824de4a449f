"""Features for `ShapesData`: a small CNN trained on its classes, shipped with the package."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ant_lightning.generation.extractors.features import Features, check_images
from ant_lightning.generation.extractors.shipped import ShippedNetwork

__all__ = ["SHAPES_WEIGHTS", "ShapesFeatures", "shapes_layers"]

SHAPES_WEIGHTS = Path(__file__).with_name("shapes_network.safetensors")


def shapes_layers() -> tuple[nn.Sequential, nn.Linear]:
    """The untrained network: ``[n, 3, 32, 32]`` in [-1, 1] to features ``[n, 64]``, and head."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (before, after) in enumerate(pairwise((3, 16, 32, 48)), 1):
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1)
        layers[f"act{i}"] = nn.SiLU()
        layers[f"pool{i}"] = nn.MaxPool2d(2)
    layers |= OrderedDict(
        pool=nn.AvgPool2d(2), flatten=nn.Flatten(), fc=nn.Linear(48 * 2 * 2, 64), act=nn.SiLU()
    )
    return nn.Sequential(layers), nn.Linear(64, 12)


class ShapesFeatures(ShippedNetwork):
    """A CNN of 32,092 parameters on coloured shapes: 64 features, 12 class logits.

    Input is uint8 ``[n, 3, h, w]``; another size than 32 x 32 is resized to it, antialiased. The
    classes are those of `ShapesData` with its default of twelve. The held-out accuracy is in the
    file's header (``metadata``); `shapes_network.py` makes the
    file again.

    Args:
        weights: A safetensors file of this network; null takes the shipped one.

    Raises:
        ConfigError: The file is missing, or its entries are not those of this network.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        path = SHAPES_WEIGHTS if weights is None else Path(weights)
        super().__init__(*shapes_layers(), path, what="shapes network", name="shapes-cnn-64")

    def extract(self, images: Tensor) -> Features:
        """Features ``[n, 64]`` and logits ``[n, 12]`` of uint8 images ``[n, 3, h, w]``.

        Raises:
            ConfigError: Another dtype, or another number of channels.
        """
        check_images(images, channels=(3,))
        x = images.to(torch.float32) / 127.5 - 1
        if images.shape[2:] != (32, 32):
            x = F.interpolate(x, (32, 32), mode="bilinear", antialias=True, align_corners=False)
        features = self.trunk(x)
        return Features(features, self.head(features))
