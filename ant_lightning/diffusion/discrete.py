"""Discrete diffusion: what a network's output means, and the reverse step that it defines."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch

from ant_lightning.diffusion.density import Density, Uniform
from ant_lightning.diffusion.forward import ForwardProcess, gather
from ant_lightning.diffusion.inputs import check_images, check_timesteps
from ant_lightning.diffusion.losses import PMeanVariance, denoising_loss
from ant_lightning.diffusion.prediction import PredictionType, check_prediction_type
from ant_lightning.diffusion.process import DenoisingLoss
from ant_lightning.diffusion.schedules import LinearSchedule, NoiseSchedule, TableSchedule
from ant_lightning.diffusion.weighting import LossWeighting
from ant_lightning.errors import ConfigError, check_one_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from ant_lightning.diffusion.forward import Timesteps
    from ant_lightning.diffusion.process import Images

VarianceType: TypeAlias = Literal["fixed_small", "fixed_large", "learned_range"]


class DiscreteDiffusion(ForwardProcess):
    """Diffusion in whole timesteps: forward process, meaning of the output, weights of the loss.

    Images are `[b, c, ...]`. Timesteps are int64 `[b]` and index the tables of this process.
    `to_x_start`, `to_eps` and `to_v` convert a prediction, by default of this process' own type.
    Another type is named: `process.to_eps(prediction, x_t, timesteps, prediction_type="x0")`.

    Args:
        schedule: The noise schedule, which returns the betas.
        prediction_type: What the network predicts: `eps`, `x0` or `v`.
        variance_type: Variance of `p(x_{t-1} | x_t)`. `fixed_small`: the posterior variance.
            `fixed_large`: beta. `learned_range`: interpolated between these two on the log scale
            by a second set of c output channels; the loss is then the hybrid one.
        loss_weighting: Weight of each timestep in the loss (`MinSNR`, `P2`); `None` for 1.
        density: How often training draws each timestep: `Uniform`, a `Table`, or a density of
            `t / T` such as `LogitNormal`.

    Raises:
        ConfigError: If a type is unknown, a beta is outside (0, 1), the density does not fit, or
            eps is predicted at a terminal SNR of zero.

    Reference:
        Ho et al., arXiv 2006.11239; Nichol and Dhariwal, arXiv 2102.09672 (learned range).

    Examples:
        >>> from ant_lightning import CosineSchedule, DiscreteDiffusion, MinSNR
        >>> process = DiscreteDiffusion(CosineSchedule(1000), loss_weighting=MinSNR(gamma=5.0))
        >>> process.num_timesteps, process.loss_weights.shape
        (1000, torch.Size([1000]))
        >>> round(float(process.log_snr[500]), 2)
        -0.03
    """

    def __init__(
        self,
        schedule: NoiseSchedule = LinearSchedule(),
        *,
        prediction_type: PredictionType = "eps",
        variance_type: VarianceType = "fixed_small",
        loss_weighting: LossWeighting | None = None,
        density: Density = Uniform(),
    ) -> None:
        super().__init__(schedule, density)
        check_prediction_type(prediction_type)
        if prediction_type == "eps" and not float(self.alphas_cumprod[-1]) > 0:
            # The last x_t is the noise itself: eps there says nothing about the image.
            raise ConfigError(
                "prediction_type: must be v or x0 with a terminal SNR of zero, found eps"
            )
        check_one_of(get_args(VarianceType), variance_type=variance_type)
        self.prediction_type: PredictionType = prediction_type
        self.variance_type: VarianceType = variance_type
        self.loss_weighting = loss_weighting
        # [T] float64, or None for weights of 1.
        self.loss_weights = (
            loss_weighting(self.snr, prediction_type) if loss_weighting is not None else None
        )
        self._respaced: dict[tuple[int, ...], DiscreteDiffusion] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy leaves out the cache of `respace`, as it leaves out that of `tables`.
        return {**super().__getstate__(), "_respaced": {}}

    def output_channels(self, channels: int) -> int:
        """Channels of the network's output for images of `channels`: twice for `learned_range`."""
        return 2 * channels if self.variance_type == "learned_range" else channels

    @property
    def output_setting(self) -> str:
        """The variance type."""
        return f"variance_type {self.variance_type!r}"

    def target(self, x_start: Images, noise: Images, times: Timesteps) -> Images:
        """What the network should predict: the noise, `x_start`, or `v = a noise - s x_start`."""
        check_images(x_start=x_start, noise=noise)
        if self.prediction_type != "v":
            return noise if self.prediction_type == "eps" else x_start
        at = self.levels(x_start, times)
        return at.a * noise - at.s * x_start  # Salimans and Ho, arXiv 2202.00512, appendix D

    def loss_weights_at(self, times: Timesteps) -> Float[Tensor, " b"] | None:
        """Entries of `loss_weights`."""
        check_timesteps(self, times)
        if self.loss_weights is None:
            return None
        return self.loss_weights.to(times.device, non_blocking=True)[times]

    def identity(self) -> dict[str, Any]:
        """The types of prediction and variance; the schedule is compared by its log-SNR."""
        return {"prediction_type": self.prediction_type, "variance_type": self.variance_type}

    def losses(
        self,
        model_output: Images,
        *,
        x_start: Images,
        x_t: Images,
        times: Timesteps,
        noise: Images,
    ) -> DenoisingLoss:
        """As in the base class; with a learned variance, the hybrid loss of `denoising_loss`."""
        weights = self.loss_weights
        return denoising_loss(self, model_output, x_start, x_t, times, noise, weights=weights)

    def p_mean_variance(
        self, model_output: Images, x_t: Images, timesteps: Timesteps, *, clip_denoised: bool = True
    ) -> PMeanVariance:
        """The reverse step `p(x_{t-1} | x_t)` that the network's output defines.

        The mean is the posterior mean at the predicted `x_start`, which `clip_denoised` clips to
        [-1, 1]; `eps` is computed from the same (clipped) `x_start`. A learned log-variance is
        `f log(beta) + (1 - f) log(posterior variance)` with `f = (value + 1) / 2`.

        Reference:
            Nichol and Dhariwal, equation 15, arXiv 2102.09672.
        """
        prediction, values = self.split_output(model_output, x_t.shape[1])
        x_start = self.to_x_start(prediction, x_t, timesteps)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean, variance, log_variance = self.q_posterior(x_start, x_t, timesteps)
        tables = self.tables(x_t.device)
        if values is not None:
            # Equation 15. The paper's v is in [0, 1]; the official networks output 2 v - 1.
            fraction = (values + 1) / 2
            log_beta = gather(tables.log_betas, timesteps, x_t)
            log_variance = fraction * log_beta + (1 - fraction) * log_variance
            variance = log_variance.exp()
        elif self.variance_type == "fixed_large":
            variance = gather(tables.fixed_large_variance, timesteps, x_t)
            log_variance = gather(tables.fixed_large_log_variance, timesteps, x_t)
        # Not the network's own eps: DDIM needs the eps that agrees with the clipped x_start.
        eps = self.to_eps(x_start, x_t, timesteps, prediction_type="x0")
        return PMeanVariance(
            mean, variance.expand_as(mean), log_variance.expand_as(mean), x_start, eps
        )

    def respace(self, timesteps: Sequence[int]) -> DiscreteDiffusion:
        """The process that visits only `timesteps`: the same `abar` at each of them, fewer steps.

        `beta'_i = 1 - abar_{t_i} / abar_{t_{i-1}}`. A respaced process is for sampling and has no
        loss weights. It is cached.

        Raises:
            ConfigError: If the timesteps are empty, do not increase, or leave [0, T).
        """
        key = tuple(int(t) for t in timesteps)
        increasing = all(a < b for a, b in pairwise(key))
        if not key or not increasing or key[0] < 0 or key[-1] >= self.num_timesteps:
            raise ConfigError(
                f"timesteps: must be increasing and inside [0, {self.num_timesteps}), "
                f"found {list(key[:8])}{' ...' if len(key) > 8 else ''}"
            )
        if key not in self._respaced:
            kept = torch.tensor(key)
            abar = self.alphas_cumprod[kept]
            betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
            process = DiscreteDiffusion(
                TableSchedule(betas.tolist()),
                prediction_type=self.prediction_type,
                variance_type=self.variance_type,
            )
            # Indexes this map, not `kept` itself: respacing twice still names training's timesteps.
            process.timestep_map = self.timestep_map[kept]
            process._is_respaced = True
            self._respaced[key] = process
        return self._respaced[key]
