"""Guidance, by the null class or by a weaker network: a denoiser of (x_t, t) alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ant_lightning.diffusion.condition import (
    Condition,
    NullCondition,
    map_condition,
    null_like,
    rows_of,
)
from ant_lightning.errors import ConfigError, check_at_least

if TYPE_CHECKING:
    from ant_lightning.diffusion.process import Images, NoiseProcess

Model: TypeAlias = Callable[[Tensor, Tensor, Condition], Tensor]


class GuidedDenoiser:
    """Guidance: `guided = weak + scale (cond - weak)`, with a weaker prediction of the same image.

    Without `guide`, `weak` is the network's output for the null class (classifier-free guidance);
    both outputs come from one call on a doubled batch. With `guide`, it is the output of that
    second network for the same classes (autoguidance).

    Only the prediction is guided; a learned variance is that of the conditional output. Guiding the
    network's output guides image, noise, velocity and score alike, because these depend linearly on
    it. `scale = 1` means no guidance in every process: the network is called on the conditional
    batch alone, at half the cost, and the guide is not called.

    Args:
        model: Called as `model(x, times, labels)`.
        labels: Classes of the batch, int64 `[b]`, or named tensors `[b, ...]`; `None` for an
            unconditional network, which is called as `model(x, times, None)`.
        null_label: The label of the null class, or a null tensor of each name for one image; `None`
            if the network has none.
        scale: 1 is no guidance, above 1 pushes away from the weaker prediction.
        guided_channels: How many of the image's channels are guided, counted from the first;
            `None` for all. The official DiT and SiT guide 3 of their 4 latent channels.
        guide: The weaker network, called as `model` is.
        interval: Guide only at noise levels `sigma = s / a` in `(low, high]`, also at 0 if `low`
            is 0; `None` for all. Outside, the output is the unguided one, at its cost. sigma is
            EDM's; it is `t / (1 - t)` on the linear path of flow matching (t = 1 is noise), and
            `sqrt((1 - abar) / abar)` in discrete diffusion.
        process: The process, which knows the noise levels; needed with an interval.

    Raises:
        ConfigError: If `scale` is not finite, or not 1 without a guide and without labels or a null
            class; if `guided_channels` is below 1; if the interval is empty or lacks the process.

    Reference:
        Ho and Salimans, "Classifier-Free Diffusion Guidance", equation 6 (its w is scale - 1),
        arXiv 2207.12598; Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself",
        equation 3, arXiv 2406.02507; Kynkäänniemi et al., "Applying Guidance in a Limited
        Interval", equation 5, arXiv 2404.07724.

    Examples:
        >>> import torch
        >>> from ant_lightning import FlowMatching, GuidedDenoiser
        >>> def model(x, t, labels):  # predicts its label
        ...     return labels.float().view(-1, 1, 1, 1).expand_as(x)
        >>> labels, x = torch.tensor([3]), torch.zeros(1, 1, 1, 1)
        >>> denoiser = GuidedDenoiser(model, labels, null_label=10, scale=2.0)
        >>> denoiser(x, torch.tensor([0.5])).item()  # 10 + 2 (3 - 10)
        -4.0
        >>> denoiser = GuidedDenoiser(
        ...     model, labels, null_label=10, scale=2.0, interval=(0.2, 2), process=FlowMatching()
        ... )
        >>> denoiser(x, torch.tensor([0.9])).item()  # sigma = 9: not guided
        3.0
    """

    def __init__(
        self,
        model: Model,
        labels: Condition,
        *,
        null_label: NullCondition,
        scale: float,
        guided_channels: int | None = None,
        guide: Model | None = None,
        interval: tuple[float, float] | None = None,
        process: NoiseProcess | None = None,
    ) -> None:
        if not math.isfinite(scale):
            raise ConfigError(f"scale: must be finite, found {scale}")
        if scale != 1.0 and guide is None and (labels is None or null_label is None):
            lacking = "labels" if labels is None else "a null class"
            raise ConfigError(f"scale: must be 1 for a network without {lacking}, found {scale}")
        if scale != 1.0 and guide is None and isinstance(null_label, Mapping):
            for name in labels:  # type: ignore[union-attr]
                if null_label.get(name) is None:
                    raise ConfigError(
                        f"null_label: needed for {name} with scale {scale}, found none"
                    )
        check_at_least(1, guided_channels=guided_channels)
        if interval is not None:
            check_interval(interval)
            if process is None:
                raise ConfigError(f"process: needed with an interval, found None with {interval}")
        self.model = model
        self.labels = labels
        self.null_label = null_label
        self.scale = scale
        self.guided_channels = guided_channels
        self.guide = guide
        self.interval = interval
        self.process = process

    def __call__(self, x_t: Images, t: Tensor) -> Images:
        """The guided output, with as many channels as the network's.

        Raises:
            ConfigError: If the batch has another size than `labels`, or fewer channels than
                `guided_channels`.
        """
        for each in self.labels.values() if isinstance(self.labels, Mapping) else [self.labels]:
            if each is not None and len(x_t) != len(each):
                raise ConfigError(
                    f"labels: must be {len(x_t)}, one for each image, found {len(each)}"
                )
        # Channels of the image, not of the output: the output may also hold variance values.
        num_guided = self.guided_channels or x_t.shape[1]
        if num_guided > x_t.shape[1]:
            raise ConfigError(
                f"guided_channels: must be at most the image's {x_t.shape[1]}, found {num_guided}"
            )
        rows = self._guided_rows(t)
        if rows is None:
            return self.model(x_t, t, self.labels)
        # Without an interval `rows` is a slice of everything, which copies nothing.
        x_some, t_some = x_t[rows], t[rows]
        some = rows_of(self.labels, rows)
        if self.guide is not None:
            cond = self.model(x_t, t, self.labels)
            weak = self.guide(x_some, t_some, some)
        else:
            # The constructor has checked that there is a null for every entry.
            null = null_like(some, self.null_label)
            labels = map_condition(lambda one, two: torch.cat([one, two]), self.labels, null)
            both = self.model(torch.cat([x_t, x_some]), torch.cat([t, t_some]), labels)
            cond, weak = both[: len(x_t)], both[len(x_t) :]
        cond_part, weak_part = cond[rows, :num_guided], weak[:, :num_guided]
        # Equation 6, with scale = w + 1.
        guided = weak_part + self.scale * (cond_part - weak_part)
        # Unguided channels, and the variance values behind the prediction, stay conditional.
        result = cond.clone()
        result[rows, :num_guided] = guided
        return result

    def _guided_rows(self, t: Tensor) -> Tensor | slice | None:
        """Which images are guided at their times; `None` for none of them."""
        if self.scale == 1.0:
            return None
        if self.interval is None:
            return slice(None)
        assert self.process is not None  # checked by the constructor
        log_snr = self.process.log_snr_at(t)
        # log(snr) = -2 log(sigma) falls with the noise level.
        low, high = self.interval
        inside = log_snr >= -2 * math.log(high)
        if low > 0:
            inside &= log_snr < -2 * math.log(low)
        rows = inside.nonzero().flatten()
        if not len(rows):
            return None
        return slice(None) if len(rows) == len(t) else rows


def check_interval(interval: tuple[float, float], *, name: str = "interval") -> None:
    """Check an interval of noise levels.

    Raises:
        ConfigError: If `0 <= low < high` does not hold.
    """
    low, high = interval
    if not 0 <= low < high:
        raise ConfigError(f"{name}: must satisfy 0 <= low < high, found {low}, {high}")
