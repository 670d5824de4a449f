"""The latent space of a first stage: from its moments to the latents that are denoised."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """The latents of one first stage, `x = (z - shift) scale`, for all channels or for each.

    The moments of a KL autoencoder are the mean and the log-variance of `z`, concatenated along the
    channels. The moments of a VQ autoencoder are `z` itself, before it is quantised; so are those
    of a deep-compression autoencoder (DC), and latents that were drawn once and stored.

    Attributes:
        kind: Kind of autoencoder, `kl`, `vq` or `dc`.
        scale: Factor that gives the latents a standard deviation of about 1; one number, or `c`.
        shift: What is subtracted from `z` before the multiplication; one number, or `c`.
        fingerprint: Hash of the encoder's and decoder's weights, the scale and the shift; empty if
            the weights are not known.
        source: Where the first stage was loaded from, for messages.

    Raises:
        ConfigError: If the kind is unknown, the scale is not above 0, or a number is not finite.

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

    kind: Literal["kl", "vq", "dc"]
    scale: float | tuple[float, ...]
    shift: float | tuple[float, ...]
    fingerprint: str
    source: str

    def __post_init__(self) -> None:
        if self.kind not in ("kl", "vq", "dc"):
            raise ConfigError(f"kind: must be 'kl', 'vq' or 'dc', found {self.kind!r}")
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):  # JSON files have lists
                object.__setattr__(self, name, tuple(value))
        if not all(_is_finite(each) and each > 0 for each in _each(self.scale)):
            raise ConfigError(f"scale: must be above 0 and finite, found {self.scale!r:.80}")
        if not all(_is_finite(each) for each in _each(self.shift)):
            raise ConfigError(f"shift: must be finite, found {self.shift!r:.80}")

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draw latents `x [b, c, h, w]` from moments `[b, 2c, h, w]` (KL) or `[b, c, h, w]`.

        Args:
            moments: Output of the encoder.
            noise: Standard normal `[b, c, h, w]`; only KL latents use it.
        """
        if self.kind == "kl":
            mean, log_variance = moments.chunk(2, dim=1)
            # The published autoencoders clamp to the same bounds.
            moments = mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise
        return (moments - _over(moments, self.shift)) * _over(moments, self.scale)

    def raw(self, x_start: Tensor) -> Tensor:
        """`z = x / scale + shift`, which the decoder takes, of latents `x [b, c, h, w]`."""
        return x_start / _over(x_start, self.scale) + _over(x_start, self.shift)

    def moments_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape of moments `(c, h, w)` for a shape of latents."""
        channels, height, width = latent_shape
        return (2 * channels if self.kind == "kl" else channels), height, width

    def latent_shape(self, moments_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape of latents `(c, h, w)` for a shape of moments."""
        channels, height, width = moments_shape
        return (channels // 2 if self.kind == "kl" else channels), height, width


def _each(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _is_finite(value: object) -> bool:
    """Whether it is a number, as files may hold anything, and of the size of a float."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _over(latents: Tensor, value: float | tuple[float, ...]) -> float | Tensor:
    """A number, or one for each channel as `[c, 1, 1]`.

    Raises:
        ConfigError: If there are not as many as channels.
    """
    if not isinstance(value, tuple):
        return value
    if len(value) != latents.shape[1]:
        raise ConfigError(
            f"scale, shift: must be one number for each of {latents.shape[1]} channels, found "
            f"{len(value)}"
        )
    return latents.new_tensor(value).view(-1, 1, 1)
