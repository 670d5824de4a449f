"""Which schedulers of diffusers can sample which process; whole timesteps for a discrete one."""

from __future__ import annotations

import inspect
import warnings
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ant_lightning.diffusion.discrete import DiscreteDiffusion
from ant_lightning.diffusion.edm import EDM
from ant_lightning.diffusion.flow import FlowMatching
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ant_lightning.diffusion.process import NoiseProcess


class Support(NamedTuple):
    """What a scheduler is for, and which arguments its methods accept.

    `timesteps` of `set_timesteps`: we may round timesteps that the scheduler places between whole
    ones. `sigmas` and `mu` of `set_timesteps`: the user may give them. `variance_noise` of `step`:
    we may pass the noise of its random algorithms.
    """

    processes: tuple[type[NoiseProcess], ...]
    accepts: frozenset[str] = frozenset()


_BOTH = (DiscreteDiffusion, FlowMatching)
_SCHEDULERS: dict[str, Support] = {
    "DDIMScheduler": Support((DiscreteDiffusion,)),
    "DEISMultistepScheduler": Support(_BOTH, frozenset({"mu"})),
    "DPMSolverMultistepScheduler": Support(_BOTH, frozenset({"timesteps", "variance_noise", "mu"})),
    "DPMSolverSinglestepScheduler": Support(_BOTH, frozenset({"timesteps", "mu"})),
    "EDMDPMSolverMultistepScheduler": Support((EDM,)),
    "EDMEulerScheduler": Support((EDM,)),
    "EulerDiscreteScheduler": Support((DiscreteDiffusion,), frozenset({"timesteps"})),
    "FlowMatchEulerDiscreteScheduler": Support(
        (FlowMatching,), frozenset({"variance_noise", "mu", "sigmas"})
    ),
    "FlowMatchHeunDiscreteScheduler": Support((FlowMatching,)),
    "HeunDiscreteScheduler": Support((DiscreteDiffusion,), frozenset({"timesteps"})),
    "PNDMScheduler": Support((DiscreteDiffusion,)),
    "UniPCMultistepScheduler": Support(_BOTH, frozenset({"mu", "sigmas"})),
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
    "use_flow_sigmas",
    "sigma_data",
    "invert_sigmas",
)


def support_of(scheduler: Any) -> Support:  # noqa: ANN401 - a scheduler
    """What is known of a scheduler.

    Raises:
        ConfigError: If it is not supported, or has a setting that belongs to the process.
    """
    # Base classes count too: a subclass of a supported scheduler is supported.
    kinds = [each.__name__ for each in type(scheduler).__mro__ if each.__name__ in _SCHEDULERS]
    if not kinds:
        raise ConfigError(
            f"scheduler: must be one of {', '.join(_SCHEDULERS)}, found {type(scheduler).__name__}"
        )
    parameters = inspect.signature(type(scheduler).__init__).parameters
    for key in _FROM_PROCESS:
        if key in parameters and scheduler.config[key] != parameters[key].default:
            raise ConfigError(
                f"scheduler: its {key} comes from the diffusion process and must not be set, "
                f"found {scheduler.config[key]!r}"
            )
    return _SCHEDULERS[kinds[0]]


def discrete_scheduler(
    scheduler: Any,  # noqa: ANN401
    process: DiscreteDiffusion,
    num_steps: int,
) -> Any:  # noqa: ANN401
    """A new scheduler like this one, with the betas of the process, on whole timesteps.

    Raises:
        ConfigError: If the scheduler cannot have this many whole timesteps.
    """
    accepts, total = support_of(scheduler).accepts, process.num_timesteps
    if num_steps > total:
        raise ConfigError(
            f"num_steps: must be at most the process' {total} timesteps, found {num_steps}"
        )
    options = {
        "trained_betas": process.betas.tolist(),
        "prediction_type": _PREDICTION_NAMES[process.prediction_type],
        "num_train_timesteps": total,
    }
    if "clip_sample" in scheduler.config:
        options["clip_sample"] = False
    with numpy_warnings_off():
        scheduler = scheduler.from_config(scheduler.config, **options)
        scheduler.set_timesteps(num_steps)
        whole = [round(float(t)) for t in scheduler.timesteps]
        if "timesteps" in accepts and scheduler.timesteps.tolist() != whole:
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
    if len(distinct) < num_steps or not distinct <= set(range(total)):
        raise ConfigError(
            f"num_steps: must be fewer or have another timestep_spacing on {total} timesteps, "
            f"which {type(scheduler).__name__} repeats or leaves, found {num_steps}"
        )
    return scheduler


@contextmanager
def numpy_warnings_off() -> Iterator[None]:
    """Ignore the warnings of NumPy 2 about diffusers, which calls NumPy functions on tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array", category=DeprecationWarning)
        yield
