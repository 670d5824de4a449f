"""The scheduler of diffusers that samples as a run does, and what differs if none does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ant_lightning.diffusion.discrete import DiscreteDiffusion
from ant_lightning.diffusion.edm import EDM
from ant_lightning.diffusion.flow import FlowMatching
from ant_lightning.diffusion.preconditioning import EDMPreconditioning
from ant_lightning.diffusion.samplers.ddim import DDIM, DDPM
from ant_lightning.diffusion.samplers.diffusers import DiffusersSampler
from ant_lightning.diffusion.samplers.ode import ODESampler
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from ant_lightning.diffusion.samplers.base import Sampler
    from ant_lightning.models.denoiser import DiffusionModule

_OTHER_IMAGES = "the same noise gives other images than in the run"
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


class Scheduling(NamedTuple):
    """How an exported model samples.

    Attributes:
        scheduler: Of diffusers.
        process: The name of the process in `ANTPipeline`.
        num_steps: Steps of the run's sampler.
        eta: Of DDIM.
        notes: What the exported model does otherwise than the run, a line each.
    """

    scheduler: Any
    process: str
    num_steps: int
    eta: float
    notes: list[str]


def scheduler_of(module: DiffusionModule) -> Scheduling:
    """The scheduler for the process and the sampler of a module.

    Raises:
        ConfigError: If diffusers has none for the process.
    """
    process, sampler = module.process, module.sampler
    num_steps = int(getattr(sampler, "num_steps", None) or 50)
    if isinstance(process, DiscreteDiffusion):
        found = _discrete(process, sampler, num_steps, module.clip_denoised)
    elif isinstance(process, FlowMatching):
        found = _flow(process, sampler, num_steps)
    elif isinstance(process, EDM) and isinstance(process.preconditioning, EDMPreconditioning):
        found = _edm(process.preconditioning.sigma_data, sampler, num_steps)
    else:
        kind = type(getattr(process, "preconditioning", process)).__name__
        raise ConfigError(
            "process: must be DiscreteDiffusion, FlowMatching on the linear path or EDM with "
            f"EDMPreconditioning to have a scheduler of diffusers, found {kind}"
        )
    if module.guide is not None:
        found.notes.append("guidance is by the null class alone: the guide is another network")
    if module.sampling.guidance_interval is not None:
        found.notes.append("guidance is at all noise levels: pipelines have no interval")
    return found


def _discrete(
    process: DiscreteDiffusion, sampler: Sampler, num_steps: int, clip: bool
) -> Scheduling:
    from diffusers import DDIMScheduler, DDPMScheduler  # noqa: PLC0415 - 5 s of imports

    common = {
        "num_train_timesteps": process.num_timesteps,
        "trained_betas": process.betas.tolist(),
        "prediction_type": _PREDICTIONS[process.prediction_type],
        "clip_sample": clip,
    }
    if isinstance(sampler, DDIM):
        latent = sampler.spacing == "ldm"
        options = {"steps_offset": int(latent), "set_alpha_to_one": not latent}
        scheduler = DDIMScheduler(**common, **options, timestep_spacing="leading")
        first = sampler._first_denoised
    else:
        even = not isinstance(sampler, DDPM) or sampler.spacing == "even"
        scheduler = DDPMScheduler(
            **common,
            variance_type=process.variance_type,
            timestep_spacing="linspace" if even else "leading",
        )
        first = 0
    notes = []
    if not isinstance(sampler, DDIM | DDPM):
        notes.append(_otherwise(type(scheduler).__name__, sampler))
    else:
        scheduler.set_timesteps(num_steps)
        visited = sampler.respaced(process).timestep_map.tolist()[first:]
        if scheduler.timesteps.tolist() != visited[::-1]:
            notes.append(
                f"{type(scheduler).__name__} visits other timesteps than the run's "
                f"{sampler.brief()}: {_OTHER_IMAGES}"
            )
    eta = sampler.eta if isinstance(sampler, DDIM) else 0.0
    return Scheduling(scheduler, "discrete", num_steps, eta, notes)


def _flow(process: FlowMatching, sampler: Sampler, num_steps: int) -> Scheduling:
    from diffusers import FlowMatchEulerDiscreteScheduler  # noqa: PLC0415

    for setting, found, needed in (
        ("path", process.path, "linear"),
        ("prediction_type", process.prediction_type, "v"),
    ):
        if found != needed:
            raise ConfigError(
                f"process.{setting}: must be {needed} for FlowMatchEulerDiscreteScheduler, found "
                f"{found}"
            )
    is_euler = isinstance(sampler, ODESampler) and sampler.method == "euler"
    plain = is_euler and sampler.grid == "uniform" and sampler.times is None  # type: ignore[attr-defined]
    notes = []
    if not plain or sampler.path not in (None, "linear"):  # type: ignore[attr-defined]
        notes.append(_otherwise("Euler's method on even times", sampler))
    shift = float(getattr(sampler, "shift", 1.0))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    kind = "flow_sit" if process.convention == "sit" else "flow"
    return Scheduling(scheduler, kind, num_steps, 0.0, notes)


def _edm(sigma_data: float, sampler: Sampler, num_steps: int) -> Scheduling:
    from diffusers import EDMEulerScheduler  # noqa: PLC0415

    own = sampler.scheduler if isinstance(sampler, DiffusersSampler) else None
    if isinstance(own, EDMEulerScheduler):
        scheduler = EDMEulerScheduler.from_config(own.config, sigma_data=sigma_data)
        return Scheduling(scheduler, "edm", num_steps, 0.0, [])
    sigmas = {name: getattr(sampler, name, None) for name in ("sigma_min", "sigma_max", "rho")}
    given = {name: value for name, value in sigmas.items() if value is not None}
    scheduler = EDMEulerScheduler(sigma_data=sigma_data, **given)
    notes = [_otherwise("EDMEulerScheduler, which is of first order,", sampler)]
    return Scheduling(scheduler, "edm", num_steps, 0.0, notes)


def _otherwise(what: str, sampler: Sampler) -> str:
    """A note where something else samples than in the run."""
    return f"{what} samples in place of the run's {sampler.brief()}: {_OTHER_IMAGES}"
