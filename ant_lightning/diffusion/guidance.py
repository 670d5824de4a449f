"""Classifier-free guidance: a conditional network as a function of (x_t, t) alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError, check_at_least

if TYPE_CHECKING:
    from collections.abc import Callable

    from ant_lightning.diffusion.forward import Timesteps
    from ant_lightning.diffusion.process import Images

__all__ = ["GuidedDenoiser"]


class GuidedDenoiser:
    """Classifier-free guidance: `guided = uncond + scale (cond - uncond)`.

    Only the prediction is guided; a learned variance is that of the conditional output. Both
    outputs come from one call on a doubled batch. With `scale = 1` the network is called on the
    conditional batch alone, at half the cost.

    Args:
        model: Called as `model(x, t, labels)`.
        labels: Classes of the batch, int64 `[b]`; `None` for an unconditional network, which is
            called as `model(x, t, None)` and cannot be guided.
        null_label: The label of the unconditional half. `None` if the network has no null class;
            guidance is then impossible.
        scale: 1 is no guidance, above 1 pushes towards the class.
        guided_channels: How many of the image's channels are guided, counted from the first;
            `None` for all. The official DiT guides 3 of its 4 latent channels.

    Raises:
        ConfigError: If `scale` is not finite, or not 1 without labels or a null class; if
            `guided_channels` is below 1.

    Reference:
        Ho and Salimans, "Classifier-Free Diffusion Guidance", equation 6 (its w is scale - 1),
        arXiv 2207.12598.

    Examples:
        >>> import torch
        >>> from ant_lightning import GuidedDenoiser
        >>> def model(x, t, labels):  # predicts its label
        ...     return labels.float().view(-1, 1, 1, 1).expand_as(x)
        >>> labels = torch.tensor([3])
        >>> denoiser = GuidedDenoiser(model, labels, null_label=10, scale=2.0)
        >>> denoiser(torch.zeros(1, 1, 1, 1), torch.tensor([500])).item()  # 10 + 2 (3 - 10)
        -4.0
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        labels: Tensor | None,
        *,
        null_label: int | None,
        scale: float,
        guided_channels: int | None = None,
    ) -> None:
        if not math.isfinite(scale):
            raise ConfigError(f"scale: must be finite, found {scale}")
        if scale != 1.0 and (labels is None or null_label is None):
            lacking = "labels" if labels is None else "a null class"
            raise ConfigError(f"scale: must be 1 for a network without {lacking}, found {scale}")
        check_at_least(1, guided_channels=guided_channels)
        self.model = model
        self.labels = labels
        self.null_label = null_label
        self.scale = scale
        self.guided_channels = guided_channels

    def __call__(self, x_t: Images, t: Timesteps) -> Images:
        """The guided output, with as many channels as the network's.

        Raises:
            ConfigError: If the batch has another size than `labels`, or fewer channels than
                `guided_channels`.
        """
        if self.labels is not None and len(x_t) != len(self.labels):
            raise ConfigError(
                f"labels: must be {len(x_t)}, one for each image, found {len(self.labels)}"
            )
        # Channels of the image, not of the output: the output may also hold variance values.
        num_guided = self.guided_channels or x_t.shape[1]
        if num_guided > x_t.shape[1]:
            raise ConfigError(
                f"guided_channels: must be at most the image's {x_t.shape[1]}, found {num_guided}"
            )
        if self.labels is None or self.null_label is None or self.scale == 1.0:
            return self.model(x_t, t, self.labels)
        labels = torch.cat([self.labels, torch.full_like(self.labels, self.null_label)])
        cond, uncond = self.model(torch.cat([x_t, x_t]), torch.cat([t, t]), labels).chunk(2)
        cond_part, uncond_part = cond[:, :num_guided], uncond[:, :num_guided]
        # Equation 6, with scale = w + 1.
        guided = uncond_part + self.scale * (cond_part - uncond_part)
        # Unguided channels, and the variance values behind the prediction, stay conditional.
        return torch.cat([guided, cond[:, num_guided:]], dim=1)
