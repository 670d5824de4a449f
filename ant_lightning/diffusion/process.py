"""The contract of a noise process: what discrete diffusion, flow matching and EDM share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ant_lightning.diffusion.inputs import check_images
from ant_lightning.diffusion.prediction import Levels, convert
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from typing import TypeAlias

    from jaxtyping import Float, Int

    Images: TypeAlias = Float[Tensor, "b c ..."]
    Times: TypeAlias = Float[Tensor, " b"] | Int[Tensor, " b"]


class DenoisingLoss(NamedTuple):
    """The loss of each image and its parts, `[b]` each.

    Attributes:
        loss: What is minimised.
        mse: Mean squared error without the weights of the times.
        vb: Term of the variational bound in bits per dimension, times `vb_scale`; `None` if the
            variance is not learned.
    """

    loss: Tensor
    mse: Tensor
    vb: Tensor | None


class NoiseProcess(ABC):
    """How noise is added, what the network is given, and what its output means.

    `x_t = a(t) x_start + s(t) noise`. All processes have one convention inside: time grows with the
    noise. A network with another convention (the time of SiT falls, its velocity has the other
    sign) meets it at two places only: `network_inputs` and `split_output`.

    **The noise axis** is cut into `T = num_timesteps` cells, cell 0 the least noise. Clusters,
    costs, affinity grids, plots and logs speak of cells. A cell of `DiscreteDiffusion` is a
    timestep. A cell of `FlowMatching` is one of T equal intervals of t, a cell of `EDM` one of T
    equal intervals of ln sigma. `log_snr [T]` is taken at the cells' centres, `density [T]` is how
    often training draws each cell, and `times(cells, u)` draws the time inside a cell.

    **Times** `[b]` are what every other method takes: int64 timesteps of `DiscreteDiffusion`,
    float64 t in [0, 1] (0 is data) of `FlowMatching`, float64 sigma of `EDM`. Cells in their place
    are refused by their dtype.

    **One step of training**: `x_t = noised(x_start, noise, times)`,
    `output = network(*network_inputs(x_t, times))`, `losses(output, ...).loss`.

    **One step of sampling**: `prediction, _ = split_output(network(*network_inputs(x, times)), c)`,
    then `to_x_start`, `to_eps`, `to_v` or `to_score` of it at `times`. `to_v` is the velocity
    `dx/dt` of the probability flow by the process' own time; so `x + (t_next - t) to_v(...)` is the
    Euler step of `FlowMatching` and of `EDM` (whose time is sigma). `levels` has `a`, `s` and
    their rates, `prior(noise)` is the state to start from at `max_time`.

    Attributes:
        prediction_type: What the network predicts, in this convention.
        time_label: Name of the process' own time on an axis.
        time_scale: Whether equal cells are equal steps of the time (`linear`) or of its logarithm
            (`log`).

    Examples:
        >>> import torch
        >>> from ant_lightning import EDM, DiscreteDiffusion, FlowMatching, NoiseProcess
        >>> def noisiest(process: NoiseProcess) -> float:  # one code for all processes
        ...     return process.times(torch.tensor([process.num_timesteps - 1])).item()
        >>> noisiest(DiscreteDiffusion())
        999
        >>> [round(noisiest(process), 2) for process in (FlowMatching(), EDM())]
        [1.0, 79.58]
    """

    prediction_type: str
    time_label: ClassVar[str]
    time_scale: ClassVar[Literal["linear", "log"]] = "linear"

    @property
    @abstractmethod
    def num_timesteps(self) -> int:
        """Number of cells of the noise axis, T."""

    @property
    @abstractmethod
    def log_snr(self) -> Float[Tensor, " T"]:
        """Log signal-to-noise ratio `2 log(a / s)` at the centre of each cell; float64, finite."""

    @property
    @abstractmethod
    def density(self) -> Float[Tensor, " T"]:
        """Share of the training draws that each cell has; float64, with the sum 1."""

    @property
    @abstractmethod
    def edges(self) -> Float[Tensor, " T+1"]:
        """Edges of the cells in the process' own time, increasing; float64."""

    @property
    @abstractmethod
    def min_time(self) -> float:
        """The time with the least noise that training draws, up to an unbounded density."""

    @property
    @abstractmethod
    def max_time(self) -> float:
        """The noisiest time, at which sampling starts from `prior`."""

    @abstractmethod
    def times(self, cells: Int[Tensor, " b"], u: Float[Tensor, " b"] | None = None) -> Times:
        """Times inside cells: the inverse cdf of the density, restricted to each cell, at `u`.

        Args:
            cells: Cells `[b]`, int64.
            u: Numbers in [0, 1), float64; `None` for the centre of each cell, whatever the density.
        """

    def cells_at(self, times: Times) -> Int[Tensor, " b"]:
        """The cells that times lie in; times beyond the axis belong to the end cells."""
        inner = self.edges[1:-1].to(times.device)
        return torch.bucketize(times.to(inner.dtype), inner, right=True)

    @abstractmethod
    def levels(self, x: Images, times: Times) -> Levels:
        """Signal and noise level of each image and their rates, which broadcast against `x`.

        They have the dtype of `x`, or float32 if `x` has half precision.
        """

    @abstractmethod
    def log_snr_at(self, times: Times) -> Float[Tensor, " b"]:
        """Log signal-to-noise ratio at any times; float64."""

    @abstractmethod
    def network_inputs(self, x_t: Images, times: Times) -> tuple[Images, Times]:
        """What the network is called with: the input in the scale it expects, and its time."""

    @abstractmethod
    def target(self, x_start: Images, noise: Images, times: Times) -> Images:
        """What `split_output(...)[0]` should be."""

    @abstractmethod
    def loss_weights_at(self, times: Times) -> Float[Tensor, " b"] | None:
        """Weight of each image's squared error in the loss; `None` for weights of 1."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Settings that change what the network's output means; a checkpoint keeps them."""

    def for_size(self, height: int, width: int) -> NoiseProcess:
        """The process for images of this size; itself, unless its density depends on the size."""
        return self

    def prior(self, noise: Images) -> Images:
        """The state at `max_time` that standard normal noise stands for."""
        return noise

    def noised(self, x_start: Images, noise: Images, times: Times) -> Images:
        """Add noise to images: `x_t = a x_start + s noise`.

        Raises:
            ConfigError: If images, noise or times have a dtype that this process does not take.
        """
        check_images(x_start=x_start, noise=noise)
        at = self.levels(x_start, times)
        return at.a * x_start + at.s * noise

    def output_channels(self, channels: int) -> int:
        """Channels that the network's output needs for images of `channels`."""
        return channels

    def accepted_channels(self, channels: int) -> tuple[int, ...]:
        """All numbers of channels that the network's output may have for images of `channels`."""
        return (self.output_channels(channels),)

    @property
    def output_setting(self) -> str:
        """Words for the setting that determines the number of output channels."""
        return type(self).__name__

    def split_output(self, model_output: Images, channels: int) -> tuple[Images, Images | None]:
        """Split a network's output into the prediction, in our convention, and the rest.

        Half precision is cast to float32: a loss must not be reduced in half precision.

        Raises:
            ConfigError: If the output does not have `accepted_channels(channels)`.
        """
        allowed = self.accepted_channels(channels)
        if model_output.shape[1] not in allowed:
            raise ConfigError(
                f"model_output: must have {' or '.join(map(str, allowed))} channels for images of "
                f"{channels} with {self.output_setting}, found {model_output.shape[1]}"
            )
        model_output = at_least_float32(model_output)
        if model_output.shape[1] == channels:
            return model_output, None
        return model_output[:, :channels], model_output[:, channels:]

    def convert(
        self,
        to: str,
        prediction: Images,
        x_t: Images,
        times: Times,
        *,
        prediction_type: str | None = None,
    ) -> Images:
        """Convert a prediction of type `prediction_type`, by default that of this process.

        Types are `x0`, `eps`, `v` and `score`. Conversions are inverse pairs wherever neither `a`
        nor `s` is 0.

        Raises:
            ConfigError: If there is no such type.
        """
        kind = prediction_type or self.prediction_type
        return convert(prediction, kind, to, x_t=x_t, at=self.levels(x_t, times))

    def to_x_start(
        self, prediction: Images, x_t: Images, times: Times, *, prediction_type: str | None = None
    ) -> Images:
        """The clean images that a prediction implies."""
        return self.convert("x0", prediction, x_t, times, prediction_type=prediction_type)

    def to_eps(
        self, prediction: Images, x_t: Images, times: Times, *, prediction_type: str | None = None
    ) -> Images:
        """The noise that a prediction implies."""
        return self.convert("eps", prediction, x_t, times, prediction_type=prediction_type)

    def to_v(
        self, prediction: Images, x_t: Images, times: Times, *, prediction_type: str | None = None
    ) -> Images:
        """The velocity that a prediction implies."""
        return self.convert("v", prediction, x_t, times, prediction_type=prediction_type)

    def to_score(
        self, prediction: Images, x_t: Images, times: Times, *, prediction_type: str | None = None
    ) -> Images:
        """The score `-eps / s` that a prediction implies."""
        return self.convert("score", prediction, x_t, times, prediction_type=prediction_type)

    def losses(
        self,
        model_output: Images,
        *,
        x_start: Images,
        x_t: Images,
        times: Times,
        noise: Images,
    ) -> DenoisingLoss:
        """Loss of each image: the mean squared error of the prediction times its weight.

        Args:
            model_output: Output of the network for `network_inputs(x_t, times)`.
            x_start: Clean images `[b, c, ...]`.
            x_t: `noised(x_start, noise, times)`.
            times: Times `[b]`.
            noise: The noise in `x_t`.

        Raises:
            ConfigError: If the output has a wrong number of channels.
        """
        check_images(x_start=x_start, noise=noise)
        prediction, _ = self.split_output(model_output, x_start.shape[1])
        mse = per_image(self._errors(prediction, x_start, noise, times).square())
        weights = self.loss_weights_at(times)
        return DenoisingLoss(mse if weights is None else weights.to(mse) * mse, mse, None)

    def _errors(self, prediction: Images, x_start: Images, noise: Images, times: Times) -> Images:
        """What the loss squares."""
        return self.target(x_start, noise, times) - prediction


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32; leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_image(values: Tensor) -> Tensor:
    """Mean over all dimensions but the first."""
    return values.flatten(start_dim=1).mean(dim=1)
