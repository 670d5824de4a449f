"""An adapter that runs the schedulers of diffusers (DPM-Solver++, UniPC, ...) as samplers."""

from __future__ import annotations

import inspect
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ant_lightning.diffusion.process import DiscreteDiffusion
from ant_lightning.diffusion.samplers.sampler import Denoiser, Sampler, SampleStep
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    # Nothing of diffusers is needed at run time: its import takes seconds, and whoever passes a
    # scheduler has done it.
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from jaxtyping import Float

__all__ = ["DiffusersSampler"]

_PREDICTION_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_FROM_PROCESS = (
    "trained_betas",
    "prediction_type",
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "rescale_betas_zero_snr",
)


class _Solver(Protocol):
    """What the schedulers of diffusers have in common; their own base class declares none of it."""

    timesteps: Tensor
    init_noise_sigma: float
    order: int
    step: Callable[..., tuple[Tensor, ...]]
    set_timesteps: Callable[..., None]
    scale_model_input: Callable[[Tensor, Tensor], Tensor]


class DiffusersSampler(Sampler):
    """Run a scheduler of diffusers on its own spacing, with the betas of the process.

    The state that its steps show may be scaled (Euler's and Heun's is `x_t / sqrt(abar_t)`); the
    denoiser always gets the unscaled x_t. A learned variance is dropped. Predicted images are
    clipped here, by `clip_denoised`, and not by the scheduler's `clip_sample`. Timesteps that the
    scheduler puts between two whole ones are rounded where it accepts timesteps of ours. The
    tables of diffusers are float32: expect 1e-5, not 1e-9.

    Args:
        scheduler: its betas, number of timesteps and prediction type must be left at their
            defaults; they come from the process.
        num_steps: steps of the scheduler; one of second order calls the network twice a step.

    Raises:
        ConfigError: not a scheduler of a discrete diffusion, a setting that belongs to the
            process was set, `num_steps` below 1 or above T; and, while sampling, a scheduler
            that draws noise which it cannot be given.

    Reference: Lu et al., DPM-Solver++, arXiv 2211.01095; Zhao et al., UniPC, arXiv 2302.04867.
    """

    def __init__(self, scheduler: SchedulerMixin, *, num_steps: int = 20) -> None:
        name = type(scheduler).__name__
        parameters = inspect.signature(type(scheduler).__init__).parameters
        missing = [key for key in ("trained_betas", "prediction_type") if key not in parameters]
        if missing:
            raise ConfigError(
                f"scheduler must be one of diffusers' that takes trained_betas and "
                f"prediction_type, found {name}, which does not take {' and '.join(missing)}"
            )
        for key in _FROM_PROCESS:
            if key in parameters and scheduler.config[key] != parameters[key].default:
                raise ConfigError(
                    f"scheduler.{key} comes from the diffusion process and must not be set on "
                    f"{name}, found {scheduler.config[key]!r}"
                )
        if num_steps < 1:
            raise ConfigError(f"DiffusersSampler: num_steps must be at least 1, found {num_steps}")
        self.scheduler = scheduler
        self.num_steps = num_steps

    def num_calls(self, process: DiscreteDiffusion) -> int:
        """How many times a whole path calls the network."""
        return len(self._prepare(process).timesteps)

    def trajectory(
        self,
        process: DiscreteDiffusion,
        denoiser: Denoiser,
        x_T: Float[Tensor, "b c ..."],
        *,
        noise: Callable[[], Tensor] | None = None,
        clip_denoised: bool = True,
        first_step: int = 0,
    ) -> Iterator[SampleStep]:
        """Give the state after every iteration; see the base class.

        x_T is standard normal and scaled here; from `first_step` on, it is the state that an
        earlier trajectory gave, and a multistep solver starts again at first order.
        """
        scheduler = self._prepare(process)
        if not 0 <= first_step < len(scheduler.timesteps):
            raise ConfigError(
                f"first_step must be in [0, {len(scheduler.timesteps)}), found {first_step}"
            )
        if scheduler.order == 2 and first_step % 2:
            raise ConfigError(
                f"first_step must be even for the second-order {type(scheduler).__name__}, "
                f"found {first_step}"
            )
        if self._takes_noise() and noise is None:
            raise ConfigError(f"{type(scheduler).__name__} is random here: noise must be given")
        return self._iterate(scheduler, process, denoiser, x_T, noise, clip_denoised, first_step)

    def _iterate(
        self,
        scheduler: _Solver,
        process: DiscreteDiffusion,
        denoiser: Denoiser,
        x: Tensor,
        noise: Callable[[], Tensor] | None,
        clip_denoised: bool,
        first_step: int,
    ) -> Iterator[SampleStep]:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if first_step == 0:
            x = x * float(scheduler.init_noise_sigma)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first_step)
        for index in range(first_step, len(scheduler.timesteps)):
            timestep = scheduler.timesteps[index]
            x_t = scheduler.scale_model_input(x, timestep)
            t = torch.full((len(x),), int(timestep), dtype=torch.int64, device=x.device)
            told = int(process.timestep_map[int(timestep)])
            output = denoiser(x_t, torch.full_like(t, told))
            prediction, _ = process.split_output(output, x.shape[1])
            x_start = process.to_x_start(prediction, x_t, t)
            if clip_denoised:
                x_start = x_start.clamp(-1, 1)
                prediction = _as_prediction(process, x_start, x_t, t)
            x = self._step(scheduler, prediction, timestep, x, noise)
            yield SampleStep(index, told, x, x_start)

    def _takes_noise(self) -> bool:
        return str(self.scheduler.config.get("algorithm_type", "")).startswith("sde") and (
            "variance_noise" in inspect.signature(self.scheduler.step).parameters
        )

    def _step(
        self,
        scheduler: _Solver,
        prediction: Tensor,
        timestep: Tensor,
        x: Tensor,
        noise: Callable[[], Tensor] | None,
    ) -> Tensor:
        """Let the scheduler step, and refuse one that drew noise by itself.

        A scheduler does not say whether it is random, so it gets a generator of ours, and that
        one's state, and the global one's, must be what they were.
        """
        options: dict[str, Any] = {}
        if self._takes_noise() and noise is not None:
            options["variance_noise"] = noise()
        generator = torch.Generator()
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = generator
        before = torch.cat([generator.get_state(), torch.get_rng_state()])
        with _numpy_warnings_off():
            stepped = scheduler.step(prediction, timestep, x, return_dict=False, **options)[0]
        if not torch.equal(before, torch.cat([generator.get_state(), torch.get_rng_state()])):
            raise ConfigError(
                f"scheduler must take its noise from the caller or draw none, found "
                f"{type(scheduler).__name__}, which draws its own; use DDPM, DDIM with eta, or "
                f"DPMSolverMultistepScheduler with algorithm_type = sde-dpmsolver++"
            )
        return stepped

    def _prepare(self, process: DiscreteDiffusion) -> _Solver:
        """A fresh scheduler with the betas of the process and its timesteps set."""
        if self.num_steps > process.num_timesteps:
            raise ConfigError(
                f"num_steps must not exceed the process' {process.num_timesteps} timesteps, "
                f"found {self.num_steps}"
            )
        options = {
            "trained_betas": process.betas.tolist(),
            "prediction_type": _PREDICTION_NAMES[process.prediction_type],
            "num_train_timesteps": process.num_timesteps,
        }
        if "clip_sample" in self.scheduler.config:
            options["clip_sample"] = False
        with _numpy_warnings_off():
            scheduler: _Solver = self.scheduler.from_config(self.scheduler.config, **options)
            scheduler.set_timesteps(self.num_steps)
            timesteps = _whole_timesteps(scheduler)
        distinct = set(timesteps)
        # On short tables some schedulers repeat a timestep in silence, which breaks the solver.
        if len(distinct) < self.num_steps or not distinct <= set(range(process.num_timesteps)):
            raise ConfigError(
                f"num_steps = {self.num_steps} on {process.num_timesteps} timesteps makes "
                f"{type(scheduler).__name__} repeat or leave them, found {timesteps}; take fewer "
                f"steps or another timestep_spacing"
            )
        return scheduler


@contextmanager
def _numpy_warnings_off() -> Iterator[None]:
    # diffusers calls NumPy functions on tensors, about which NumPy 2 complains.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array", category=DeprecationWarning)
        yield


def _whole_timesteps(scheduler: _Solver) -> list[int]:
    """The timesteps as whole numbers, rounded through the scheduler itself if they are not."""
    found = [float(t) for t in scheduler.timesteps]
    if any(t != round(t) for t in found):
        # The network was trained on whole timesteps; rounding here alone would leave the
        # scheduler's noise levels between them.
        accepts = "timesteps" in inspect.signature(scheduler.set_timesteps).parameters
        try:
            if accepts:
                scheduler.set_timesteps(timesteps=list(dict.fromkeys(round(t) for t in found)))
        except ValueError as error:
            raise ConfigError(f"scheduler must visit whole timesteps: {error}") from error
        found = [float(t) for t in scheduler.timesteps]
        if any(t != round(t) for t in found):
            raise ConfigError(
                f"scheduler must visit whole timesteps, found {found[:3]} ...; set "
                f"timestep_spacing to 'leading' or 'trailing' on {type(scheduler).__name__}"
            )
    return [round(t) for t in found]


def _as_prediction(process: DiscreteDiffusion, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    if process.prediction_type == "eps":
        return process.to_eps(x_start, x_t, t, prediction_type="x0")
    if process.prediction_type == "v":
        return process.to_v(x_start, x_t, t, prediction_type="x0")
    return x_start
