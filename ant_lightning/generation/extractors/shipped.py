"""Small classifiers whose weights are shipped with the package, as extractors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from ant_lightning.errors import FileError
from ant_lightning.files.safetensors_file import read_safetensors
from ant_lightning.generation.extractors.features import FeatureExtractor

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ShippedNetwork"]


class ShippedNetwork(FeatureExtractor):
    """A trunk that gives features and a head that classifies them, read from one file.

    What the file says of itself, such as the held-out accuracy, is `metadata`.

    Args:
        trunk: Images to features ``[n, d]``.
        head: Features to logits.
        path: A safetensors file of both.
        what: The network in messages, such as "digits network".
        name: See `FeatureExtractor`; a hash of the weights is added.

    Raises:
        ConfigError: The file is missing, or its entries are not those of this network.
    """

    metadata: dict[str, str]

    def __init__(
        self, trunk: nn.Module, head: nn.Linear, path: Path, *, what: str, name: str
    ) -> None:
        state, self.metadata = read_safetensors(path)
        super().__init__(num_features=head.in_features, name=name)
        self.trunk, self.head = trunk, head
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise FileError(
                f"weights must be a safetensors file of the {what}; {path} is not: "
                f"{str(error).splitlines()[-1].strip()[:200]}"
            ) from error
        # of the values, not of the file: safetensors orders its header at random
        digest = hashlib.sha256()
        for key in sorted(state):
            digest.update(state[key].numpy().tobytes())
        self.name += f"-{digest.hexdigest()[:8]}"
        self.requires_grad_(False).eval()
