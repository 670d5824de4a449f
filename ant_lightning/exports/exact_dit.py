"""The network of DiT for diffusers; `ant-lightning export` copies this file into the folder.

`DiTTransformer2DModel` embeds the time at frequencies 10000^(-i/127). The official DiT, and with it
its published weights, has 10000^(-i/128). No configuration changes it, so this class does.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from diffusers import DiTTransformer2DModel

__all__ = ["ExactDiT"]


class ExactDiT(DiTTransformer2DModel):  # type: ignore[misc]
    """`DiTTransformer2DModel` with the time frequencies of the official DiT."""

    # Wrapped, because diffusers reads the names of the settings from the signature.
    @wraps(DiTTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
