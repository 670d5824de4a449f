"""Flow matching: interpolation of data and noise over t in [0, 1], on the paths of SiT."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

import torch

from ant_lightning.diffusion.continuous import ContinuousProcess
from ant_lightning.diffusion.density import Density, Uniform
from ant_lightning.diffusion.inputs import check_images, check_real_times
from ant_lightning.diffusion.prediction import Levels, Quantity
from ant_lightning.errors import ConfigError, check_one_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from ant_lightning.diffusion.process import Images

FlowPath: TypeAlias = Literal["linear", "gvp", "vp"]
FlowWeighting: TypeAlias = Literal["velocity", "likelihood", "sigma_sqrt", "cosmap"]
FlowConvention: TypeAlias = Literal["sit", "diffusers"]

# beta_max - beta_min and beta_min of the VP path.
_BETA_RANGE, _BETA_MIN = 19.9, 0.1


class FlowMatching(ContinuousProcess):
    """`x_t = a(t) x_start + s(t) noise` for t from 0 (data) to 1 (noise).

    | path | a | s |
    |---|---|---|
    | `linear` | `1 - t` | `t` |
    | `gvp` | `cos(pi t / 2)` | `sin(pi t / 2)` |
    | `vp` | `exp(-19.9 t² / 4 - 0.1 t / 2)` | `sqrt(1 - a²)` |

    Inside, the velocity is `v = dx_t / dt`, which points to the noise: `noise - x_start` on the
    linear path. SiT's time runs the other way. With the convention `sit` the network is given
    `1 - t` and its output is `-v`, as in SiT's checkpoints; with `diffusers` it is given `1000 t`
    and its output is `v`, as in SD3's. Only the velocity changes its sign, eps, x0 and the score do
    not. If the network has twice as many output channels as the images (`learn_sigma` of SiT), the
    second half is dropped.

    Args:
        path: The path.
        prediction_type: What the network predicts: `v`, `eps`, `x0` or `score`.
        loss_weighting: Weight of the squared error; `None` for 1, as for all published velocity
            models. `velocity` and `likelihood` are SiT's, for eps, x0 and score: the same loss as
            that of the velocity, and the likelihood weighting. `sigma_sqrt` (`1 / t²`) and `cosmap`
            (`2 / (pi (1 - 2 t + 2 t²))`) are SD3's, for v. The error of a score is measured as that
            of `s score`, as in SiT.
        density: How often training draws each t.
        convention: Time and sign of the network.
        train_eps: Distance of training times to the ends, as SiT: by default 1e-5 to the data end
            for `vp`, 1e-3 to both ends for eps, x0 and score on the other paths, and 0 for v.
        num_timesteps: Number of cells of the noise axis.

    Raises:
        ConfigError: If a name is unknown, a weighting does not fit the prediction, `train_eps` is
            not in [0, 0.5), or is set for the velocity on a path where SiT ignores it.

    Reference:
        Ma et al., "SiT", arXiv 2401.08740; Lipman et al., "Flow Matching for Generative Modeling",
        arXiv 2210.02747; Esser et al., "Scaling Rectified Flow Transformers", arXiv 2403.03206.

    Examples:
        >>> import torch
        >>> from ant_lightning import FlowMatching
        >>> process = FlowMatching(path="linear")
        >>> x_start, noise = torch.full((1, 1, 2, 2), 4.0), torch.zeros(1, 1, 2, 2)
        >>> t = process.times(torch.tensor([249]), torch.tensor([0.5]))
        >>> x_t = process.noised(x_start, noise, t)
        >>> round(t.item(), 4), round(x_t[0, 0, 0, 0].item(), 3)
        (0.2495, 3.002)
        >>> round(process.to_v(x_start, x_t, t, prediction_type="x0")[0, 0, 0, 0].item(), 3)
        -4.0
        >>> round(process.network_inputs(x_t, t)[1].item(), 4)  # SiT's time
        0.7505
    """

    time_label: ClassVar[str] = "t (0 data, 1 noise)"

    def __init__(
        self,
        path: FlowPath = "linear",
        *,
        prediction_type: Quantity = "v",
        loss_weighting: FlowWeighting | None = None,
        density: Density = Uniform(),
        convention: FlowConvention = "sit",
        train_eps: float | None = None,
        num_timesteps: int = 1000,
    ) -> None:
        check_one_of(get_args(FlowPath), path=path)
        check_one_of(get_args(Quantity), prediction_type=prediction_type)
        check_one_of(get_args(FlowConvention), convention=convention)
        _check_weighting(loss_weighting, prediction_type)
        self.path: FlowPath = path
        self.prediction_type: Quantity = prediction_type
        self.loss_weighting: FlowWeighting | None = loss_weighting
        self.convention: FlowConvention = convention
        axis = _train_interval(path, prediction_type, train_eps)
        super().__init__(density=density, num_timesteps=num_timesteps, axis=axis, coordinate="time")

    def with_convention(self, convention: FlowConvention) -> FlowMatching:
        """The same process for a network of this convention."""
        process = copy.copy(self)
        process.convention = convention
        return process

    def _time_of(self, z: Tensor) -> Tensor:
        return z

    @property
    def max_time(self) -> float:
        """1, pure noise, whatever `train_eps` is."""
        return 1.0

    def levels(self, x: Images, times: Float[Tensor, " b"]) -> Levels:
        """Signal and noise level of each image, their rates by t, and `det = a s' - s a'`."""
        check_images(x=x)
        check_real_times(self, times)
        dtype = torch.promote_types(x.dtype, torch.float32)

        def each(value: Tensor) -> Tensor:
            return value.to(dtype).view(-1, *[1] * (x.ndim - 1))

        if self.path == "linear":
            return Levels(each(1 - times), each(times), a_rate=-1.0, s_rate=1.0, det=1.0)
        if self.path == "gvp":
            a, s = torch.cos(times * (math.pi / 2)), torch.sin(times * (math.pi / 2))
            rate = math.pi / 2
            return Levels(each(a), each(s), each(-rate * s), each(rate * a), det=rate)
        log_a, log_a_rate = _vp_log_signal(times)
        # expm1 keeps the digits of 1 - a² near the data.
        a, s = log_a.exp(), (-torch.expm1(2 * log_a)).sqrt()
        a_rate = a * log_a_rate
        # s² = 1 - a²: s s' = -a a', and det = -a' (a² + s²) / s.
        return Levels(each(a), each(s), each(a_rate), each(-a * a_rate / s), each(-a_rate / s))

    def log_snr_at(self, times: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`2 log(a / s)`; on the linear path `-2 logit(t)`."""
        check_real_times(self, times)
        if self.path == "linear":
            return -2 * torch.logit(times)
        if self.path == "gvp":
            return -2 * torch.tan(times * (math.pi / 2)).log()
        log_a, _ = _vp_log_signal(times)
        return 2 * log_a - (-torch.expm1(2 * log_a)).log()

    def times_at(self, log_snr: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The inverse of `log_snr_at`; beyond t = 1 on the VP path, which has some signal there."""
        if self.path == "linear":
            return torch.sigmoid(-log_snr / 2)
        if self.path == "gvp":
            return torch.atan((-log_snr / 2).exp()) * (2 / math.pi)
        # 1 / a² = 1 + 1 / snr = exp(BETA_RANGE t² / 2 + BETA_MIN t); the clamp is for a snr of 0.
        exponent = torch.logaddexp(torch.zeros_like(log_snr), -log_snr).clamp(max=1e4)
        root = (_BETA_MIN**2 + 2 * _BETA_RANGE * exponent).sqrt()
        return 2 * exponent / (_BETA_MIN + root)

    def network_inputs(
        self, x_t: Images, times: Float[Tensor, " b"]
    ) -> tuple[Images, Float[Tensor, " b"]]:
        """The images as they are, and `1 - t` (`sit`) or `1000 t` (`diffusers`) in float32."""
        check_images(x_t=x_t)
        check_real_times(self, times)
        told = 1 - times if self.convention == "sit" else 1000 * times
        return x_t, told.float()

    def accepted_channels(self, channels: int) -> tuple[int, ...]:
        """The images' channels, or twice as many, of which the second half is dropped."""
        return (channels, 2 * channels)

    def split_output(self, model_output: Images, channels: int) -> tuple[Images, Images | None]:
        """The prediction in our convention: SiT's velocity changes its sign."""
        prediction, _ = super().split_output(model_output, channels)
        if self.prediction_type == "v" and self.convention == "sit":
            prediction = -prediction
        return prediction, None

    def target(self, x_start: Images, noise: Images, times: Float[Tensor, " b"]) -> Images:
        """`v = a' x_start + s' noise`, the noise, or `x_start`; for a score, `-noise / s`."""
        check_images(x_start=x_start, noise=noise)
        check_real_times(self, times)
        if self.prediction_type == "eps":
            return noise
        if self.prediction_type == "x0":
            return x_start
        at = self.levels(x_start, times)
        if self.prediction_type == "score":
            return -noise / at.s
        return at.a_rate * x_start + at.s_rate * noise

    def _errors(
        self, prediction: Images, x_start: Images, noise: Images, times: Float[Tensor, " b"]
    ) -> Images:
        """The error of the prediction; for a score that of `s score`, as in SiT."""
        if self.prediction_type == "score":
            return self.levels(x_start, times).s * prediction + noise
        return super()._errors(prediction, x_start, noise, times)

    def loss_weights_at(self, times: Float[Tensor, " b"]) -> Float[Tensor, " b"] | None:
        """The weight of the squared error at each time."""
        check_real_times(self, times)
        kind = self.loss_weighting
        if kind is None:
            return None
        if kind == "sigma_sqrt":
            return times.pow(-2)
        if kind == "cosmap":
            return 2 / (math.pi * (1 - 2 * times + 2 * times.square()))
        at = self.levels(times, times)
        # SiT's drift variance is g = det s / a. On the error of eps the weights are (g / s)² and
        # g / s²; an error of x_start is one of eps times a / s.
        weights = (at.det / at.a) ** 2 if kind == "velocity" else at.det / (at.a * at.s)
        return weights * (at.a / at.s).square() if self.prediction_type == "x0" else weights

    def identity(self) -> dict[str, Any]:
        """Path, prediction and convention."""
        return {
            "path": self.path,
            "prediction_type": self.prediction_type,
            "convention": self.convention,
        }


def _vp_log_signal(t: Tensor) -> tuple[Tensor, Tensor]:
    """`log a` of the VP path and its derivative; Song et al., arXiv 2011.13456, appendix C."""
    return -t.square() * _BETA_RANGE / 4 - t * _BETA_MIN / 2, -t * _BETA_RANGE / 2 - _BETA_MIN / 2


def _check_weighting(loss_weighting: str | None, prediction_type: str) -> None:
    if loss_weighting is None:
        return
    check_one_of(get_args(FlowWeighting), loss_weighting=loss_weighting)
    for_v = loss_weighting in {"sigma_sqrt", "cosmap"}
    if for_v != (prediction_type == "v"):
        rule = "v" if for_v else "eps, x0 or score (SiT ignores it for the velocity)"
        raise ConfigError(
            f"loss_weighting: {loss_weighting} needs prediction_type {rule}, found "
            f"{prediction_type}"
        )


def _train_interval(
    path: str, prediction_type: str, train_eps: float | None
) -> tuple[float, float]:
    """The interval of training times: `check_interval` of SiT, in our time."""
    if train_eps is not None and not 0 <= train_eps < 0.5:
        raise ConfigError(f"train_eps: must be at least 0 and below 0.5, found {train_eps}")
    if path == "vp":
        return (1e-5 if train_eps is None else train_eps), 1.0
    if prediction_type == "v":
        if train_eps:
            raise ConfigError(
                f"train_eps: must be 0 for the velocity on the path {path}, whose times have no "
                f"singular end, found {train_eps}"
            )
        return 0.0, 1.0
    eps = 1e-3 if train_eps is None else train_eps
    return eps, 1 - eps
