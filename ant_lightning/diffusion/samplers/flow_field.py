"""The velocity of flow matching at a state and a time, from the output of a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

    from ant_lightning.diffusion.flow import FlowMatching
    from ant_lightning.diffusion.samplers.base import Denoiser


class FlowPrediction(NamedTuple):
    """What one network call says, `[b, c, ...]` each: velocity, noise and image."""

    v: Tensor
    eps: Tensor
    x_start: Tensor


class FlowField:
    """The velocity `dx/dt` of a process at any state, in our time (1 is noise).

    With `walked`, the field of another path: at the time with the same signal-to-noise ratio, a
    state of one path is a state of the other in another scale, so that one network serves both.
    With `a`, `s` the levels of the new path, the network is called at `x / scale`, and
    `v = a' x_start + s' eps`.

    Args:
        process: The process of training.
        denoiser: The network.
        walked: The process whose path is walked; `None` for that of training.
        clip_denoised: Whether predicted images are clipped to [-1, 1].

    Attributes:
        process: The process whose path is walked.

    Reference:
        Lipman et al., "Flow Matching Guide and Code", section 4.6 (post-training schedule change),
        arXiv 2412.06264.
    """

    def __init__(
        self,
        process: FlowMatching,
        denoiser: Denoiser,
        *,
        walked: FlowMatching | None = None,
        clip_denoised: bool = False,
    ) -> None:
        self.process = process if walked is None else walked
        self._trained = process
        self._denoiser = denoiser
        self._clip_denoised = clip_denoised

    def at(self, x: Tensor, t: float | Float[Tensor, " b"]) -> FlowPrediction:
        """Call the network at `x` `[b, c, ...]` and `t`, one time for all or one for each image."""
        times = _times(t, x)
        if self.process is self._trained:
            prediction = self._predicted(x, times)
            v, eps, x_start = (
                convert(prediction, x, times)
                for convert in (self.process.to_v, self.process.to_eps, self.process.to_x_start)
            )
        else:
            trained = self._trained.times_at(self.process.log_snr_at(times))
            at, old = self.process.levels(x, times), self._trained.levels(x, trained)
            # The ratio of the signals is that of the noise levels: the larger one has more digits.
            scale = torch.where(at.a > at.s, at.a / old.a, at.s / old.s)
            prediction = self._predicted(x / scale, trained)
            eps = self._trained.to_eps(prediction, x / scale, trained)
            x_start = self._trained.to_x_start(prediction, x / scale, trained)
            v = at.a_rate * x_start + at.s_rate * eps
        if self._clip_denoised:
            x_start = x_start.clamp(-1, 1)
            kind = {"prediction_type": "x0"}
            # At t = 0 the state is the image: its noise cannot be told from the clipped one.
            noisy = self.process.levels(x, times).s > 0
            v = torch.where(noisy, self.process.to_v(x_start, x, times, **kind), v)
            eps = torch.where(noisy, self.process.to_eps(x_start, x, times, **kind), eps)
        return FlowPrediction(v, eps, x_start)

    def scale(self, t: float) -> float:
        """Scale of a state of the walked path at `t` over that of training at the matching time."""
        if self.process is self._trained:
            return 1.0
        times = torch.tensor([t], dtype=torch.float64)
        trained = self._trained.times_at(self.process.log_snr_at(times))
        at, old = self.process.levels(times, times), self._trained.levels(times, trained)
        return float(at.s / old.s)

    def _predicted(self, x: Tensor, times: Tensor) -> Tensor:
        return self._trained.split_output(self._denoiser(x, times), x.shape[1])[0]


def _times(t: float | Tensor, x: Tensor) -> Tensor:
    if isinstance(t, Tensor):
        return t
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return torch.full((len(x),), t, dtype=dtype, device=x.device)
