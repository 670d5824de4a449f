"""Feature extractors from folders of Hugging Face transformers: DINOv2 and CLIP."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional as F

from ant_lightning.errors import ConfigError, extra_for
from ant_lightning.generation.extractor import FeatureExtractor, Features

if TYPE_CHECKING:
    from torch import Tensor, nn


class _TransformersFeatures(FeatureExtractor):
    """An image network of transformers, on images that are resized and normalised first."""

    mean: ClassVar[tuple[float, float, float]]
    deviation: ClassVar[tuple[float, float, float]]
    _mean: Tensor
    _deviation: Tensor
    network: Any  # a class of an extra

    def __init__(self, network: nn.Module, *, num_features: int, name: str, size: int) -> None:
        super().__init__(num_features=num_features, name=name)
        self.network = network.eval().requires_grad_(False)
        self.size = size
        self.register_buffer("_mean", torch.tensor(self.mean)[:, None, None])
        self.register_buffer("_deviation", torch.tensor(self.deviation)[:, None, None])

    def pixels(self, images: Tensor) -> Tensor:
        """What the network sees, `[n, 3, size, size]`: bicubic with antialias, normalised."""
        x = images.expand(-1, 3, -1, -1).float()
        x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True)
        return (x / 255 - self._mean) / self._deviation


class DINOv2Features(_TransformersFeatures):
    r"""DINOv2 as an extractor: the Fréchet distance is then FD-DINOv2.

    Features are the class token after the last layer norm, `[n, d]` (d = 1024 for ViT-L/14, the
    network of FD-DINOv2). Grey images are repeated to RGB. Images are resized to `size` x `size`,
    bicubic with antialias and not cropped, and normalised as ImageNet.

    Args:
        folder: Local folder of `transformers.Dinov2Model` with safetensors.
        size: Side of the images that the network sees, a multiple of its patches.

    Raises:
        ConfigError: If transformers is not installed, or the folder holds no such network.

    Reference:
        Stein et al., "Exposing flaws of generative model evaluation metrics", arXiv 2306.04675;
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv
        2312.02696 (the resizing).

    Examples:
        >>> from ant_lightning import DINOv2Features
        >>> DINOv2Features("missing")
        Traceback (most recent call last):
        ...
        ant_lightning.errors.ConfigError: folder: must be a folder with config.json, found missing
    """

    title = "DINOv2"
    mean = (0.485, 0.456, 0.406)
    deviation = (0.229, 0.224, 0.225)

    def __init__(self, folder: str | Path, *, size: int = 224) -> None:
        network, digest = pretrained(folder, "Dinov2Model")
        d = network.config.hidden_size
        super().__init__(network, num_features=d, name=f"dinov2-{d}-{size}-{digest}", size=size)

    def extract(self, images: Tensor) -> Features:
        """Features `[n, d]` of uint8 `[n, c, h, w]`; no logits."""
        return Features(self.network(self.pixels(images)).last_hidden_state[:, 0].float())


class CLIPFeatures(_TransformersFeatures):
    r"""The image half of CLIP as an extractor: projected image embeddings, `[n, d]`.

    Grey images are repeated to RGB. Images are resized to the side that the network was trained
    at, bicubic with antialias and not cropped, and normalised as CLIP's.

    Args:
        folder: Local folder of `transformers.CLIPModel` with safetensors.

    Raises:
        ConfigError: If transformers is not installed, or the folder holds no such network.

    Reference:
        Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
        arXiv 2103.00020; Kynkäänniemi et al., "The Role of ImageNet Classes in Fréchet Inception
        Distance", arXiv 2203.06026 (the distance on it).

    Examples:
        >>> from ant_lightning import CLIPFeatures
        >>> CLIPFeatures("missing")
        Traceback (most recent call last):
        ...
        ant_lightning.errors.ConfigError: folder: must be a folder with config.json, found missing
    """

    title = "CLIP's image network"
    mean = (0.48145466, 0.4578275, 0.40821073)
    deviation = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, folder: str | Path) -> None:
        network, digest = pretrained(folder, "CLIPModel")
        d, size = network.config.projection_dim, network.config.vision_config.image_size
        super().__init__(network, num_features=d, name=f"clip-{d}-{size}-{digest}", size=size)

    def extract(self, images: Tensor) -> Features:
        """Features `[n, d]` of uint8 `[n, c, h, w]`; no logits."""
        pooled = self.network.vision_model(self.pixels(images)).pooler_output
        return Features(self.network.visual_projection(pooled).float())


def pretrained(folder: str | Path, name: str) -> tuple[Any, str]:
    """The network of a local folder by transformers' class `name`, and a digest of its weights.

    Raises:
        ConfigError: If transformers is not installed, the folder is not one of this class, or a
            weight is missing.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"folder: must be a folder with config.json, found {folder}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"folder: must hold weights as safetensors, found none in {folder}")
    with extra_for("folder", "transformers"):
        import transformers  # noqa: PLC0415 - an extra, and slow to import
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its report of the weights: see below
    try:
        network, info = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"folder: must hold a {name}, found {folder} ({str(error).splitlines()[0][:200]})"
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
    others = [each[0] for each in info["mismatched_keys"]]
    missing = sorted({*info["missing_keys"], *others})
    if missing:
        raise ConfigError(
            f"folder: must hold a {name}, found {folder} without {missing[0]} and "
            f"{len(missing) - 1} more of its weights"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return network, digest.hexdigest()[:8]
