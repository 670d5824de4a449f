"""CLIP score of images and their captions, by torchmetrics on a local folder of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics.multimodal.clip_score import CLIPScore

from ant_lightning.errors import ConfigError
from ant_lightning.generation.transformers_features import pretrained

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class CaptionScore(CLIPScore):
    r"""How well images fit their captions: torchmetrics' `CLIPScore` on a local network.

    `max(100 * mean of cos(image embedding, text embedding), 0)`, from 0 to 100.
    Captions are cut at the network's number of tokens (77). A `torchmetrics.Metric`: call `update`
    with uint8 images `[n, 1 or 3, h, w]` and n captions, then `compute`.

    Args:
        folder: Local folder of `transformers.CLIPModel` with its processor.

    Raises:
        ConfigError: If transformers is not installed, or the folder holds no such network.

    Reference:
        Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", arXiv
        2104.08718.

    Examples:
        >>> from ant_lightning import CaptionScore
        >>> CaptionScore("missing")
        Traceback (most recent call last):
        ...
        ant_lightning.errors.ConfigError: folder: must be a folder with config.json, found missing
    """

    def __init__(self, folder: str | Path) -> None:
        network, _ = pretrained(folder, "CLIPModel")
        parts: Any = (_Embeddings(network), _processor(folder))  # in place of transformers' classes
        super().__init__(lambda: parts)

    def update(self, images: Tensor, captions: Sequence[str]) -> None:  # type: ignore[override]
        """Add uint8 images `[n, c, h, w]` and their captions.

        Raises:
            ConfigError: If their numbers differ.
        """
        if len(images) != len(captions):
            raise ConfigError(
                f"captions: must be one for each of {len(images)} images, found {len(captions)}"
            )
        with torch.no_grad():
            super().update(images.expand(-1, 3, -1, -1), list(captions))


class _Embeddings(nn.Module):
    """CLIP whose embeddings are tensors, as torchmetrics takes them; transformers 5 wraps them."""

    def __init__(self, network: Any) -> None:  # noqa: ANN401 - a class of an extra
        super().__init__()
        self.network = network.eval()
        self.config = network.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return _tensor(self.network.get_image_features(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _tensor(self.network.get_text_features(input_ids, attention_mask))


def _tensor(output: Any) -> Tensor:  # noqa: ANN401 - a tensor, or an object of transformers
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


def _processor(folder: str | Path) -> Any:  # noqa: ANN401 - a class of an extra
    from transformers import CLIPProcessor  # noqa: PLC0415 - an extra, and slow to import

    try:
        return CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"folder: must hold CLIP's processor and tokenizer, found {folder} without"
        ) from error
