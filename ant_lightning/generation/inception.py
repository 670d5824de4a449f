"""The field's feature extractor: torch-fidelity's InceptionV3, its weights checked before use."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.torch_file import read_torch
from ant_lightning.generation.extractor import FeatureExtractor, Features
from ant_lightning.generation.inception_file import URL, no_weights


class InceptionFeatures(FeatureExtractor):
    """InceptionV3 of the FID papers, as torch-fidelity ported it from TensorFlow.

    Features are the 2048 values after the last pooling; logits are the 1008 class scores without
    the bias, from which torch-fidelity and the ADM evaluator compute the Inception score. Grey
    images are repeated to RGB; torch-fidelity resizes to 299 x 299 as TensorFlow 1 did.

    The weights are downloaded into torch hub's checkpoint folder unless they are there. We read the
    file with `weights_only=True` first, because torch-fidelity unpickles it without.

    Args:
        weights: File with torch-fidelity's state dict; `None` for the one in torch hub's folder.

    Raises:
        ConfigError: If the file is missing and cannot be downloaded (the message says which file to
            put where), or it is no state dict of this network.

    Reference:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
        Equilibrium", arXiv 1706.08500; Obukhov et al., torch-fidelity.

    Examples:
        >>> from ant_lightning import InceptionFeatures
        >>> InceptionFeatures("weights.pth")
        Traceback (most recent call last):
        ...
        ant_lightning.errors.FileError: weights.pth: no such file
    """

    title = "InceptionV3 of torch-fidelity"

    def __init__(self, weights: str | Path | None = None) -> None:
        path = _downloaded_weights() if weights is None else Path(weights)
        _check_weights(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
        super().__init__(num_features=2048, name=f"inception-v3-2048-{digest}")
        from torch_fidelity.feature_extractor_inceptionv3 import (  # noqa: PLC0415
            FeatureExtractorInceptionV3,
        )

        try:
            self.network = FeatureExtractorInceptionV3(
                name="inception-v3-compat",
                features_list=["2048", "logits_unbiased"],
                feature_extractor_weights_path=str(path),
            )
        except RuntimeError as error:  # load_state_dict lists the entries that do not fit
            raise ConfigError(
                f"{path}: must hold the weights of torch-fidelity's InceptionV3, found others "
                f"({str(error).splitlines()[-1].strip()[:200]})"
            ) from error

    def extract(self, images: Tensor) -> Features:
        """Features `[n, 2048]` and unbiased logits `[n, 1008]` of uint8 `[n, c, h, w]`."""
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        return Features(features, logits)


def _downloaded_weights() -> Path:
    """The file in torch hub's checkpoint folder, downloaded if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path))
        except OSError as error:  # urllib's URLError is one, and does not name the file
            raise no_weights(error, path) from error
    return path


def _check_weights(path: Path) -> None:
    """Check that a file holds only named tensors, without running code that it may contain."""
    content = read_torch(path)
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise FileError(f"{path}: must hold a dict of named tensors, found other content")
