"""Small classifiers as extractors, whose weights are shipped with the package."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.safetensors_file import read_safetensors
from ant_lightning.generation.extractor import FeatureExtractor, Features, check_images

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WEIGHTS", "DigitsFeatures", "ShapesFeatures", "digits_layers", "shapes_layers"]

WEIGHTS = {
    name: Path(__file__).with_name(f"{name}_network.safetensors") for name in ("digits", "shapes")
}


def digits_layers() -> nn.ModuleDict:
    """The untrained network: `[n, 1, 8, 8]` in [-1, 1] to 64 features, to 10 logits.

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
    return nn.ModuleDict({"trunk": trunk, "head": nn.Linear(64, 10)})


def shapes_layers() -> nn.ModuleDict:
    """The untrained network: `[n, 3, 32, 32]` in [-1, 1] to 64 features, to 12 logits."""
    layers: dict[str, nn.Module] = {}
    for i, (before, after) in enumerate(pairwise((3, 16, 32, 48)), 1):
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1)
        layers[f"act{i}"] = nn.SiLU()
        layers[f"pool{i}"] = nn.MaxPool2d(2)
    top = OrderedDict(
        pool=nn.AvgPool2d(2), flatten=nn.Flatten(), fc=nn.Linear(192, 64), act=nn.SiLU()
    )
    trunk = nn.Sequential(OrderedDict(layers) | top)
    return nn.ModuleDict({"trunk": trunk, "head": nn.Linear(64, 12)})


class _ShippedNetwork(FeatureExtractor):
    """A trunk that gives features and a head that classifies them, read from a safetensors file.

    `metadata` is what the file says of itself, such as the held-out accuracy.
    """

    what: ClassVar[str]  # a name in `WEIGHTS`
    layers: ClassVar[Callable[[], nn.ModuleDict]]
    channels: ClassVar[int]
    size: ClassVar[int]
    trunk: nn.Module
    head: nn.Module

    def __init__(self, weights: str | Path | None = None) -> None:
        path = Path(weights or WEIGHTS[self.what])
        state, self.metadata = read_safetensors(path)
        super().__init__(num_features=64, name="")
        for name, module in type(self).layers().items():
            self.add_module(name, module)
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise FileError(
                f"{path}: must hold the weights of the {self.what} network, found others "
                f"({str(error).splitlines()[-1].strip()[:200]})"
            ) from error
        # Of the values and not of the file: safetensors orders its header at random.
        digest = hashlib.sha256()
        for key in sorted(state):
            digest.update(state[key].numpy().tobytes())
        self.name = f"{self.what}-cnn-64-{digest.hexdigest()[:8]}"
        self.requires_grad_(False).eval()

    def extract(self, images: Tensor) -> Features:
        """Features `[n, 64]` and logits `[n, classes]` of uint8 images `[n, c, h, w]`.

        Raises:
            ConfigError: Another dtype, number of channels or size than the network takes.
        """
        check_images(images, channels=(self.channels,))
        features = self.trunk(self.resized(images.to(torch.float32) / 127.5 - 1))
        return Features(features, self.head(features))

    def resized(self, images: Tensor) -> Tensor:
        """Images `[n, c, size, size]`, of which a network may refuse other sizes."""
        if images.shape[2:] == (self.size, self.size):
            return images
        size = (self.size, self.size)
        return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


class DigitsFeatures(_ShippedNetwork):
    """A CNN of 43,050 parameters on scikit-learn's 8x8 digits: 64 features, 10 class logits.

    It takes uint8 `[n, 1, 8, 8]`, where 0 to 255 stand for the digits' 0 to 16. Held-out accuracy
    and the split it was trained on are in the file's header (`metadata`); `python -m
    studies.extractor_networks digits` trains it again.

    Args:
        weights: A safetensors file of this network; `None` takes the shipped one.

    Raises:
        ConfigError: The file is missing, or its entries are not those of this network.

    Examples:
        >>> import torch
        >>> from ant_lightning import DigitsFeatures
        >>> digits = DigitsFeatures()
        >>> features, logits = digits.extract(torch.zeros(5, 1, 8, 8, dtype=torch.uint8))
        >>> features.shape, logits.shape
        (torch.Size([5, 64]), torch.Size([5, 10]))
    """

    what = "digits"
    layers = staticmethod(digits_layers)
    channels, size = 1, 8

    def resized(self, images: Tensor) -> Tensor:
        """Refuse all but 8 x 8."""
        if images.shape[2:] != (8, 8):
            raise ConfigError(f"images: must be 8 x 8 digits, found {list(images.shape[2:])}")
        return images


class ShapesFeatures(_ShippedNetwork):
    """A CNN of 32,092 parameters on coloured shapes: 64 features, 12 class logits.

    It takes uint8 `[n, 3, h, w]`; another size than 32 x 32 is resized to it, antialiased. The
    classes are those of `ShapesData` with its default of twelve. The held-out accuracy is in the
    file's header (`metadata`); `python -m studies.extractor_networks shapes` trains it again.

    Args:
        weights: A safetensors file of this network; `None` takes the shipped one.

    Raises:
        ConfigError: The file is missing, or its entries are not those of this network.

    Examples:
        >>> import torch
        >>> from ant_lightning import ShapesFeatures
        >>> ShapesFeatures()(torch.zeros(5, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([5, 64])
    """

    what = "shapes"
    layers = staticmethod(shapes_layers)
    channels, size = 3, 32
