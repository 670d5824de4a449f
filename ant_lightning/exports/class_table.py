"""The classes of a latent diffusion UNet; `ant-lightning export` copies this file into the folder.

`UNet2DConditionModel` takes the embedding of the class as its only text token.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class ClassTable(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Classes `[b]` to `encoder_hidden_states` `[b, 1, dim]`."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_embeddings: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_embeddings, dim)

    def forward(self, labels: Tensor) -> Tensor:
        """Look the classes up."""
        token: torch.Tensor = self.embedding(labels)
        return token[:, None]
