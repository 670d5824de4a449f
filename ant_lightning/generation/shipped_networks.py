"""Extractors whose weights are shipped with the package: small classifiers."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.safetensors_file import read_safetensors
from ant_lightning.generation.extractor import FeatureExtractor, Features, check_images


class ShippedNetwork(NamedTuple):
    """A small CNN with 64 features.

    Attributes:
        convolutions: Channels in and out of each convolution, and the max-pooling behind it.
        average: Average-pooling behind the last one.
        size: Side of the images in pixels.
        num_classes: Number of the classes.
    """

    convolutions: tuple[tuple[int, int, int], ...]
    average: int
    size: int
    num_classes: int

    def layers(self) -> nn.ModuleDict:
        """The untrained network: `trunk` maps images in [-1, 1] to features, `head` to logits.

        SiLU instead of ReLU: a dead ReLU is a constant feature, and the covariance is singular.
        """
        parts: dict[str, nn.Module] = {}
        size = self.size // self.average
        for i, (before, after, pool) in enumerate(self.convolutions, 1):
            parts[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1)
            parts[f"act{i}"] = nn.SiLU()
            parts[f"pool{i}"] = nn.MaxPool2d(pool)
            size //= pool
        parts["average"], parts["flatten"] = nn.AvgPool2d(self.average), nn.Flatten()
        parts["fc"], parts["act"] = nn.Linear(after * size**2, 64), nn.SiLU()
        trunk = nn.Sequential(OrderedDict(parts))
        return nn.ModuleDict({"trunk": trunk, "head": nn.Linear(64, self.num_classes)})


NETWORKS = {
    "digits": ShippedNetwork(((1, 32, 1), (32, 32, 2)), average=1, size=8, num_classes=10),
    "shapes": ShippedNetwork(
        ((3, 16, 2), (16, 32, 2), (32, 48, 2)), average=2, size=32, num_classes=12
    ),
}


def weights_file(name: str) -> Path:
    """The shipped weights of a network of `NETWORKS`."""
    return Path(__file__).with_name(f"{name}_network.safetensors")


class _ShippedFeatures(FeatureExtractor):
    """A network of `NETWORKS` with its weights.

    Attributes:
        metadata: Texts in the header of the file, such as the held-out accuracy.
    """

    what: ClassVar[str]  # its name in `NETWORKS`
    trunk: nn.Module
    head: nn.Module

    def __init__(self, weights: str | Path | None = None) -> None:
        network = NETWORKS[self.what]
        path = Path(weights or weights_file(self.what))
        state, self.metadata = read_safetensors(path)
        super().__init__(num_features=64, name="")  # named below, after its weights
        for name, module in network.layers().items():
            self.add_module(name, module)
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise FileError(
                f"{path}: must hold the weights of the {self.what} network, found others "
                f"({str(error).splitlines()[-1].strip()[:200]})"
            ) from error
        # A digest of the values, not of the file: safetensors orders its header at random.
        digest = hashlib.sha256()
        for key in sorted(state):
            digest.update(state[key].numpy().tobytes())
        self.name = f"{self.what}-cnn-64-{digest.hexdigest()[:8]}"
        self.requires_grad_(False).eval()

    def extract(self, images: Tensor) -> Features:
        """Features `[n, 64]` and logits `[n, classes]` of uint8 images `[n, c, h, w]`.

        Raises:
            ConfigError: If images have another dtype, number of channels or size than the network
                takes.
        """
        network = NETWORKS[self.what]
        channels = (network.convolutions[0][0],)
        check_images(images, channels=channels, extractor=type(self).__name__)
        x = images.to(torch.float32) / 127.5 - 1
        if images.shape[2:] != (network.size, network.size):
            x = self._resized(x, network.size)
        features = self.trunk(x)
        return Features(features, self.head(features))

    def _resized(self, images: Tensor, size: int) -> Tensor:
        sides = (size, size)
        return F.interpolate(images, sides, mode="bilinear", antialias=True, align_corners=False)


class DigitsFeatures(_ShippedFeatures):
    """A CNN of 43,050 parameters on scikit-learn's 8x8 digits: 64 features, 10 class logits.

    It takes uint8 `[n, 1, 8, 8]`, where 0 to 255 stand for the digits' 0 to 16. The file's header
    (`metadata`) has the held-out accuracy and the split that it was trained on. To train it again:
    `python -m studies.extractor_networks digits`.

    Args:
        weights: A safetensors file of this network; `None` for the shipped one.

    Raises:
        ConfigError: If the file is missing, or its entries are not those of this network.

    Examples:
        >>> import torch
        >>> from ant_lightning import DigitsFeatures
        >>> digits = DigitsFeatures()
        >>> features, logits = digits.extract(torch.zeros(5, 1, 8, 8, dtype=torch.uint8))
        >>> features.shape, logits.shape
        (torch.Size([5, 64]), torch.Size([5, 10]))
    """

    what = "digits"
    title = "the network for digits of ant_lightning"

    def _resized(self, images: Tensor, size: int) -> Tensor:
        raise ConfigError(f"images: must be 8 x 8 digits, found {list(images.shape[2:])}")


class ShapesFeatures(_ShippedFeatures):
    """A CNN of 32,092 parameters on coloured shapes: 64 features, 12 class logits.

    It takes uint8 `[n, 3, h, w]` and resizes other sizes to 32 x 32, antialiased. The classes are
    those of `ShapesData` with its default of twelve. The file's header (`metadata`) has the
    held-out accuracy. To train it again: `python -m studies.extractor_networks shapes`.

    Args:
        weights: A safetensors file of this network; `None` for the shipped one.

    Raises:
        ConfigError: If the file is missing, or its entries are not those of this network.

    Examples:
        >>> import torch
        >>> from ant_lightning import ShapesFeatures
        >>> ShapesFeatures()(torch.zeros(5, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([5, 64])
    """

    what = "shapes"
    title = "the network for coloured shapes of ant_lightning"
