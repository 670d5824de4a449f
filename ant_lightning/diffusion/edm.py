"""EDM: noise of level sigma added to the image, and a preconditioned network."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ant_lightning.diffusion.continuous import ContinuousProcess
from ant_lightning.diffusion.density_normal import LogNormal
from ant_lightning.diffusion.inputs import check_images, check_real_times
from ant_lightning.diffusion.preconditioning import EDMPreconditioning, Preconditioning
from ant_lightning.diffusion.prediction import Levels
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from ant_lightning.diffusion.density import Density
    from ant_lightning.diffusion.process import Images


class EDM(ContinuousProcess):
    """`x = x_start + sigma noise`; the time is sigma, and the network estimates the clean image.

    `to_x_start` of the output F is `D = c_skip x + c_out F(c_in x, c_noise)`. The loss is the mean
    squared error of F. It equals EDM's `lambda(sigma) |D - x_start|²`, because
    `lambda = 1 / c_out²` for every preconditioning; EDM sums over pixels, this is a mean. The
    velocity `dx/dsigma = (x - D) / sigma` is the predicted noise.

    The noise axis has equal intervals of ln sigma in `[sigma_min, sigma_max]`. A log-normal
    density has mass outside, which belongs to the end cells: a few training draws are beyond the
    ends, as in the official code.

    Args:
        preconditioning: Meaning of the network's input, time and output.
        density: How often training draws each ln sigma; the default is EDM's for images.
        sigma_min: Lower end of the axis; by default 0.002 (EDM) or the network's own.
        sigma_max: Upper end of the axis, where sampling starts; by default 80 or the network's own.
        num_timesteps: Number of cells of the noise axis.

    Raises:
        ConfigError: If `0 < sigma_min < sigma_max` does not hold, the network was not trained on
            all of it, or the density does not fit.

    Reference:
        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", table 1,
        arXiv 2206.00364.

    Examples:
        >>> import torch
        >>> from ant_lightning import EDM
        >>> process = EDM(num_timesteps=4)
        >>> [round(sigma, 3) for sigma in process.edges.tolist()]
        [0.002, 0.028, 0.4, 5.657, 80.0]
        >>> sigma = process.times(torch.tensor([2]))
        >>> x = torch.full((1, 1, 2, 2), 3.0)
        >>> round(sigma.item(), 3), round(process.network_inputs(x, sigma)[1].item(), 3)
        (1.504, 0.102)
    """

    time_label: ClassVar[str] = "sigma"
    time_scale: ClassVar[Literal["linear", "log"]] = "log"
    prediction_type: str = "F"

    def __init__(
        self,
        preconditioning: Preconditioning = EDMPreconditioning(),
        *,
        density: Density = LogNormal(),
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        num_timesteps: int = 1000,
    ) -> None:
        trained = preconditioning.sigma_range
        low = trained[0] if sigma_min is None else sigma_min
        high = trained[1] if sigma_max is None else sigma_max
        if not 0 < low < high < math.inf:
            raise ConfigError(
                f"sigma_min: must satisfy 0 < sigma_min < sigma_max, found {low}, {high}"
            )
        self.preconditioning = preconditioning
        axis = (math.log(low), math.log(high))
        super().__init__(
            density=density, num_timesteps=num_timesteps, axis=axis, coordinate="log_sigma"
        )

    def _time_of(self, z: Tensor) -> Tensor:
        return z.exp()

    def _log_snr_of_cells(self) -> Tensor:
        # Equally spaced on a grid of 2^-40, on which sums are exact. Clusterings by log-SNR then
        # meet the same ties as those by cell, whatever rounding is.
        grid = 2.0**40
        low, high = (float(self._edges[end]) for end in (0, -1))
        step = round(2 * (high - low) / self.num_timesteps * grid) / grid
        places = (
            torch.arange(self.num_timesteps, dtype=torch.float64) - (self.num_timesteps - 1) / 2
        )
        return round(-(low + high) * grid) / grid - step * places

    def prior(self, noise: Images) -> Images:
        """`sigma_max noise`, as in the official sampler."""
        return self.max_time * noise

    def levels(self, x: Images, times: Float[Tensor, " b"]) -> Levels:
        """`a = 1` and `s = sigma`, with the rates 0 and 1."""
        check_images(x=x)
        check_real_times(self, times)
        s = _like(times, x)
        return Levels(torch.ones_like(s), s, a_rate=0.0, s_rate=1.0, det=1.0)

    def log_snr_at(self, times: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`-2 ln sigma`."""
        check_real_times(self, times)
        return -2 * times.log()

    def network_inputs(
        self, x_t: Images, times: Float[Tensor, " b"]
    ) -> tuple[Images, Float[Tensor, " b"]]:
        """`c_in x` and `c_noise` in float32."""
        check_images(x_t=x_t)
        check_real_times(self, times)
        scale = _like(self.preconditioning.c_in(times), x_t)
        return scale * x_t, self.preconditioning.c_noise(times).float()

    def accepted_channels(self, channels: int) -> tuple[int, ...]:
        """The images' channels; for iDDPM's networks also twice as many."""
        return (channels, 2 * channels)[: 1 + self.preconditioning.doubles_output]

    def split_output(self, model_output: Images, channels: int) -> tuple[Images, Images | None]:
        """F; a variance that iDDPM's networks learned is dropped."""
        return super().split_output(model_output, channels)[0], None

    def target(self, x_start: Images, noise: Images, times: Float[Tensor, " b"]) -> Images:
        """`(x_start - c_skip x) / c_out`, written without the difference."""
        check_images(x_start=x_start, noise=noise)
        check_real_times(self, times)
        of_image, of_noise = self.preconditioning.target(times)
        return _like(of_image, x_start) * x_start + _like(of_noise, x_start) * noise

    def convert(
        self,
        to: str,
        prediction: Images,
        x_t: Images,
        times: Float[Tensor, " b"],
        *,
        prediction_type: str | None = None,
    ) -> Images:
        """As in the base class; `F`, the network's output, is one more type."""
        check_images(x_t=x_t)
        check_real_times(self, times)
        kind = prediction_type or "F"
        if kind == to:
            return prediction
        c_skip, c_out = (
            _like(each(times), x_t)
            for each in (self.preconditioning.c_skip, self.preconditioning.c_out)
        )
        if kind == "F":
            x_start = c_skip * x_t + c_out * prediction
            return super().convert(to, x_start, x_t, times, prediction_type="x0")
        if to == "F":
            x_start = super().convert("x0", prediction, x_t, times, prediction_type=kind)
            return (x_start - c_skip * x_t) / c_out
        return super().convert(to, prediction, x_t, times, prediction_type=kind)

    def loss_weights_at(self, times: Float[Tensor, " b"]) -> None:
        """`None`: on F all noise levels weigh the same."""

    def identity(self) -> dict[str, Any]:
        """The preconditioning with its numbers."""
        settings = {
            name: value
            for name, value in vars(self.preconditioning).items()
            if isinstance(value, int | float)
        }
        return {"preconditioning": type(self.preconditioning).__name__, **settings}


def _like(values: Float[Tensor, " b"], x: Images) -> Images:
    """`values` as `[b, 1, ...]` in the dtype of `x`, float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return values.to(dtype).view(-1, *[1] * (x.ndim - 1))
