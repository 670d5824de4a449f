"""Continuous uncertainty: a learned log-variance for every noise level."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ant_lightning.balancing.base import SampleBalancer
from ant_lightning.errors import check_above, check_finite, check_whole

if TYPE_CHECKING:
    from jaxtyping import Float


class ContinuousUncertainty(SampleBalancer):
    """A learned log-variance for each noise level: the mean of `exp(-u(c)) L + u(c)`.

    `u` is linear in fixed random Fourier features of `c = ln(sigma) / 4 = -log_snr / 8`, where
    `sigma` is the ratio of noise to signal. It starts at 0, which is unweighted training. For a
    fixed loss the optimum is `u = ln L`, which gives a sample the weight `1 / L(c)`.

    This is the limit of `UncertaintyWeighting` for many clusters, up to the scale of the
    objective, and has no number of clusters to choose: the weights of `UncertaintyWeighting`
    settle at `1 / (2 L_i)`, which has the same proportions once clusters are narrow. `min_loss`
    bounds the weights as it does there: `u` is fitted to `max(L, min_loss)`, and no weight exceeds
    `1 / min_loss`.

    The parameters belong in a group of their own, without weight decay and outside gradient
    clipping and EMA. They stay in float32.

    Args:
        num_tasks: Number of tasks `k`, for which weights are reported.
        lr: Learning rate of `u`, read when the optimizer's groups are made.
        num_features: Number of Fourier features; their frequencies are standard normal.
        min_loss: Loss below which a sample's weight stops growing; 0 for no bound.

    Raises:
        ConfigError: If `lr` or `num_features` is not above 0, or `min_loss` negative or not finite.

    Reference:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
        arXiv 2312.02696, appendix B.1 (there the features' layer has a normalised weight).

    Examples:
        >>> balancer = ContinuousUncertainty(num_tasks=5)
        >>> balancer.sample_weights(torch.tensor([8.0, 0.0, -8.0]))
        tensor([1., 1., 1.])
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(
        self, num_tasks: int, *, lr: float = 0.01, num_features: int = 128, min_loss: float = 1e-8
    ) -> None:
        super().__init__(num_tasks)
        check_above(0, lr=lr)
        check_whole(1, num_features=num_features)
        self.lr = lr
        check_finite(0, min_loss=min_loss)
        self.min_loss = min_loss
        # A fixed seed: the features are part of the method, and runs with different seeds share
        # them.
        generator = torch.Generator().manual_seed(0)
        frequencies = torch.randn(num_features, generator=generator, dtype=torch.float32)
        phases = torch.rand(num_features, generator=generator, dtype=torch.float32)
        self.register_buffer("frequencies", 2 * math.pi * frequencies)
        self.register_buffer("phases", 2 * math.pi * phases)
        self.weight = nn.Parameter(torch.zeros(num_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def log_variance(self, log_snr: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`u` at these noise levels, float32."""
        # c = ln(sigma) / 4 is EDM2's noise condition; log_snr = -2 ln(sigma).
        c = -log_snr.to(self.weight).unsqueeze(-1) / 8
        # EDM2's Fourier features have the factor sqrt(2), for a mean square of 1. Divided by
        # sqrt(num_features), their vector has a length near 1 whatever their number.
        features = math.sqrt(2 / len(self.weight)) * (c * self.frequencies + self.phases).cos()
        with torch.autocast(features.device.type, enabled=False):
            return features @ self.weight + self.bias

    def forward(
        self, losses: Float[Tensor, " b"], log_snr: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """`exp(-u) L + u` of each sample, as long as `min_loss` is not reached.

        The gradient of each `L` is its weight, and that of `u` is `1 - exp(-u) max(L, min_loss)`.
        """
        log_variance = self.log_variance(log_snr)
        losses = losses.to(log_variance)
        own = (-log_variance).exp() * losses.detach().clamp(min=self.min_loss)
        # `own - own.detach()` is 0: it only gives u its gradient. `_weights` is detached and
        # bounded, and gives the losses theirs.
        return self._weights(log_variance) * losses + log_variance + (own - own.detach())

    def sample_weights(self, log_snr: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`exp(-u)` of each sample, at most `1 / min_loss`."""
        return self._weights(self.log_variance(log_snr))

    def _weights(self, log_variance: Tensor) -> Tensor:
        """`exp(-u)`, at most `1 / min_loss`, detached."""
        log_variance = log_variance.detach()
        if self.min_loss > 0:
            log_variance = log_variance.clamp(min=math.log(self.min_loss))
        return (-log_variance).exp()
