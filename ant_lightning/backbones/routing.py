"""Denoising task routing: each noise level uses its own window of a block's channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ant_lightning.errors import ConfigError, check_above

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class ChannelRouting:
    """Masks of channels that slide with the noise level; no parameters.

    Of `C` channels `C_b = floor(beta C)` are active, from `round((C - C_b) (t / last_time)^alpha)`
    on. A block then maps `x` to `block(m x) + (1 - m) x`: channels outside of the window pass by.

    Args:
        alpha: How fast the window slides: above 1 it stays longer at low noise.
        beta: Share of the channels that are active.
        last_time: Its time input at the most noise: 999 for a thousand timesteps.

    Raises:
        ConfigError: If a number is out of range.

    Reference:
        Park et al., "Denoising Task Routing for Diffusion Models", arXiv 2310.07138.

    Examples:
        >>> import torch
        >>> from ant_lightning import ChannelRouting
        >>> routing = ChannelRouting(alpha=1.0, beta=0.5)
        >>> routing.masks(torch.tensor([0, 500, 999]), 4).tolist()
        [[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    """

    alpha: float = 4.0
    beta: float = 0.8
    last_time: float = 999.0

    def __post_init__(self) -> None:
        check_above(0, alpha=self.alpha, last_time=self.last_time)
        if not 0 < self.beta <= 1:
            raise ConfigError(f"beta: must be above 0 and at most 1, found {self.beta}")

    def masks(self, timesteps: Tensor, channels: int) -> Float[Tensor, "b channels"]:
        """The masks of images at these times, 0 or 1."""
        active = int(channels * self.beta)
        # In float64, as the published code: at halves float32 would round to another channel.
        place = (timesteps.double() / self.last_time).clamp(0, 1) ** self.alpha
        start = (place * (channels - active)).round()[:, None]
        channel = torch.arange(channels, device=timesteps.device)
        return ((channel >= start) & (channel < start + active)).float()
