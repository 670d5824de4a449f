"""The schedulers of diffusers (DPM-Solver++, UniPC, ...) as samplers."""

from __future__ import annotations

import inspect
import warnings
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ant_lightning.diffusion.samplers.base import Denoiser, Sampler, SampleStep
from ant_lightning.errors import ConfigError, check_at_least

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    # For types only: the import takes seconds, and whoever passes a scheduler has done it.
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from ant_lightning.diffusion.discrete import DiscreteDiffusion

__all__ = ["DiffusersSampler"]

# The supported schedulers, each with the arguments that its methods accept. `timesteps` of
# `set_timesteps`: we may round timesteps that the scheduler places between whole ones.
# `variance_noise` of `step`: we may pass the noise of its random algorithms.
_SCHEDULERS: dict[str, set[str]] = {
    "DDIMScheduler": set(),
    "DEISMultistepScheduler": set(),
    "DPMSolverMultistepScheduler": {"timesteps", "variance_noise"},
    "DPMSolverSinglestepScheduler": {"timesteps"},
    "EulerDiscreteScheduler": {"timesteps"},
    "HeunDiscreteScheduler": {"timesteps"},
    "PNDMScheduler": set(),
    "UniPCMultistepScheduler": set(),
}
_PREDICTION_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
# Settings of a scheduler that the process determines; they must be left at their defaults.
_FROM_PROCESS = (
    "trained_betas",
    "prediction_type",
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "rescale_betas_zero_snr",
)


class DiffusersSampler(Sampler):
    """Runs a scheduler of diffusers on its own spacing, with the betas of the process.

    Supported are the schedulers DDIM, DEISMultistep, DPMSolverMultistep, DPMSolverSinglestep,
    EulerDiscrete, HeunDiscrete, PNDM and UniPCMultistep.

    The states of its steps may be scaled (Euler and Heun keep `x_t / sqrt(abar_t)`), but the
    denoiser is always given the unscaled `x_t`. A learned variance is dropped. Predicted images are
    clipped by `clip_denoised`; the scheduler's own `clip_sample` is switched off. Timesteps between
    two whole ones are rounded if the scheduler accepts that. The tables of diffusers are float32,
    so results agree with exact ones to about 1e-5, not 1e-9.

    Args:
        scheduler: Its betas, number of timesteps and prediction type must have their defaults;
            they come from the process.
        num_steps: Steps of the scheduler; a second-order one calls the network twice in a step.

    Raises:
        ConfigError: If the scheduler is not supported, draws noise of its own, or has a setting
            that belongs to the process; if `num_steps` is below 1 or above T.

    Reference:
        Lu et al., "DPM-Solver++", arXiv 2211.01095; Zhao et al., "UniPC", arXiv 2302.04867.

    Examples:
        >>> import torch
        >>> from diffusers import UniPCMultistepScheduler
        >>> from ant_lightning import DiffusersSampler, DiscreteDiffusion
        >>> sampler = DiffusersSampler(UniPCMultistepScheduler(), num_steps=5)
        >>> process, x_T = DiscreteDiffusion(), torch.zeros(1, 3, 4, 4)
        >>> steps = sampler.trajectory(process, lambda x, t: torch.zeros_like(x), x_T)
        >>> [step.timestep for step in steps]
        [999, 799, 599, 400, 200]
    """

    is_multistep: ClassVar = True

    def __init__(self, scheduler: SchedulerMixin, *, num_steps: int = 20) -> None:
        check_at_least(1, num_steps=num_steps)
        # Base classes count too: a subclass of a supported scheduler is supported.
        kinds = [each.__name__ for each in type(scheduler).__mro__ if each.__name__ in _SCHEDULERS]
        if not kinds:
            raise ConfigError(
                f"scheduler: must be one of {', '.join(_SCHEDULERS)}, found "
                f"{type(scheduler).__name__}"
            )
        self.scheduler = scheduler
        self.num_steps = num_steps
        self._accepts = _SCHEDULERS[kinds[0]]
        parameters = inspect.signature(type(scheduler).__init__).parameters
        for key in _FROM_PROCESS:
            if key in parameters and scheduler.config[key] != parameters[key].default:
                raise ConfigError(
                    f"scheduler: its {key} comes from the diffusion process and must not be set, "
                    f"found {scheduler.config[key]!r}"
                )
        if self.is_random and "variance_noise" not in self._accepts:
            raise ConfigError(
                "scheduler: must not draw noise of its own, found algorithm_type "
                f"{scheduler.config['algorithm_type']} of {kinds[0]}"
            )

    @property
    def is_random(self) -> bool:
        """Whether the scheduler solves the stochastic differential equation."""
        return str(self.scheduler.config.get("algorithm_type", "")).startswith("sde")

    def num_calls(self, process: DiscreteDiffusion) -> int:
        """Number of network calls on a whole path."""
        return len(self._prepared(process).timesteps)

    def _steps(
        self,
        process: DiscreteDiffusion,
        denoiser: Denoiser,
        x: Tensor,
        *,
        noise: Callable[[], Tensor] | None,
        clip_denoised: bool,
        first_step: int,
    ) -> Iterator[SampleStep]:
        """A multistep solver starts again at first order from `first_step` on."""
        scheduler = self._prepared(process)
        if first_step % scheduler.order:
            raise ConfigError(
                f"first_step: must be even for the second-order {type(scheduler).__name__}, "
                f"found {first_step}"
            )
        # A later state already has the scheduler's scale.
        if first_step == 0:
            x = x * float(scheduler.init_noise_sigma)
        # Otherwise the scheduler searches for its place by the value of the first timestep.
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first_step)
        for index, timestep in list(enumerate(scheduler.timesteps))[first_step:]:
            x_t = scheduler.scale_model_input(x, timestep)
            t = torch.full((len(x),), int(timestep), dtype=torch.int64, device=x.device)
            original = int(process.timestep_map[int(timestep)])
            output = denoiser(x_t, torch.full_like(t, original))
            prediction, _ = process.split_output(output, x.shape[1])
            x_start = process.to_x_start(prediction, x_t, t)
            if clip_denoised:
                x_start = x_start.clamp(-1, 1)
                # The scheduler takes a prediction of the network's type: convert the clipped image.
                to_own = {"eps": process.to_eps, "x0": process.to_x_start, "v": process.to_v}
                to_own_type = to_own[process.prediction_type]
                prediction = to_own_type(x_start, x_t, t, prediction_type="x0")
            # Otherwise the scheduler would draw from the global generator.
            options = {"variance_noise": noise()} if noise and self.is_random else {}
            with _numpy_warnings_off():
                x = scheduler.step(prediction, timestep, x, return_dict=False, **options)[0]
            yield SampleStep(index, original, x, x_start)

    def _prepared(self, process: DiscreteDiffusion) -> Any:  # noqa: ANN401 - a scheduler
        """A new scheduler, since schedulers have state, with the betas of the process."""
        total = process.num_timesteps
        if self.num_steps > total:
            raise ConfigError(
                f"num_steps: must be at most the process' {total} timesteps, found {self.num_steps}"
            )
        options = {
            "trained_betas": process.betas.tolist(),
            "prediction_type": _PREDICTION_NAMES[process.prediction_type],
            "num_train_timesteps": total,
        }
        if "clip_sample" in self.scheduler.config:
            options["clip_sample"] = False
        with _numpy_warnings_off():
            scheduler = self.scheduler.from_config(self.scheduler.config, **options)
            scheduler.set_timesteps(self.num_steps)
            whole = [round(float(t)) for t in scheduler.timesteps]
            if "timesteps" in self._accepts and scheduler.timesteps.tolist() != whole:
                # The network was trained on whole timesteps. The scheduler must be told the rounded
                # ones, because its noise levels follow from them. Schedulers with some settings
                # (Karras sigmas) refuse; the check below then raises.
                with suppress(ValueError):
                    scheduler.set_timesteps(timesteps=list(dict.fromkeys(whole)))
        timesteps = scheduler.timesteps.tolist()
        if any(t != round(t) for t in timesteps):
            raise ConfigError(
                f"scheduler: must visit whole timesteps, found {timesteps[:3]} ...; set "
                f"timestep_spacing to 'leading' or 'trailing' on {type(scheduler).__name__}"
            )
        # On short tables some schedulers repeat a timestep, which breaks the solver.
        distinct = set(timesteps)
        if len(distinct) < self.num_steps or not distinct <= set(range(total)):
            raise ConfigError(
                f"num_steps: must be fewer or have another timestep_spacing on {total} timesteps, "
                f"which {type(scheduler).__name__} repeats or leaves, found {self.num_steps}"
            )
        return scheduler


@contextmanager
def _numpy_warnings_off() -> Iterator[None]:
    """Ignore the warnings of NumPy 2 about diffusers, which calls NumPy functions on tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array", category=DeprecationWarning)
        yield
