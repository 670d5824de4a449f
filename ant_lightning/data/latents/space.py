"""What a first stage's moments mean: from moments to the latents that are denoised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LatentSpace"]


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """The latents of one first stage, `x = (z - shift) scale`.

    The moments of a KL autoencoder are the mean and the log-variance of `z`, one after the other
    on the channels; those of a VQ autoencoder are `z` itself, before it is quantised.

    Attributes:
        kind: Which autoencoder.
        scale: Multiplies the latents, so that their standard deviation is about 1.
        shift: Is subtracted before.
        fingerprint: Hash of the encoder's and decoder's weights, the scale and the shift.
        source: Where the first stage was loaded from, for messages.

    Raises:
        ConfigError: If the kind is another, or the scale or the shift is out of its range.

    Examples:
        >>> import torch
        >>> from ant_lightning import LatentSpace
        >>> space = LatentSpace(kind="kl", scale=0.5, shift=1.0, fingerprint="", source="")
        >>> space.moments_shape((4, 8, 8))
        (8, 8, 8)
        >>> moments = torch.tensor([3.0, -1.0]).view(1, 2, 1, 1)  # mean, log-variance
        >>> space.sample(moments, noise=torch.zeros(1, 1, 1, 1)).item()
        1.0
    """

    kind: Literal["kl", "vq"]
    scale: float
    shift: float
    fingerprint: str
    source: str

    def __post_init__(self) -> None:
        if self.kind not in ("kl", "vq"):
            raise ConfigError(f"kind: must be 'kl' or 'vq', found {self.kind!r}")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ConfigError(f"scale: must be above 0 and finite, found {self.scale}")
        if not math.isfinite(self.shift):
            raise ConfigError(f"shift: must be finite, found {self.shift}")

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Latents `x [b, c, h, w]` from moments `[b, 2c, h, w]` (KL) or `[b, c, h, w]` (VQ).

        Args:
            moments: What the encoder gave.
            noise: Standard normal `[b, c, h, w]`; without effect on VQ latents.
        """
        if self.kind == "kl":
            mean, log_variance = moments.chunk(2, dim=1)
            # The bounds are those of the published autoencoders.
            moments = mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise
        return (moments - self.shift) * self.scale

    def moments_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """`(c, h, w)` of the moments of latents."""
        channels, height, width = latent_shape
        return (2 * channels if self.kind == "kl" else channels), height, width

    def latent_shape(self, moments_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """`(c, h, w)` of the latents of moments."""
        channels, height, width = moments_shape
        return (channels // 2 if self.kind == "kl" else channels), height, width
