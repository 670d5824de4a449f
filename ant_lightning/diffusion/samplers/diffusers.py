"""The schedulers of diffusers (DPM-Solver++, UniPC, ...) as samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ant_lightning.diffusion.discrete import DiscreteDiffusion
from ant_lightning.diffusion.edm import EDM
from ant_lightning.diffusion.flow import FlowMatching
from ant_lightning.diffusion.preconditioning import EDMPreconditioning
from ant_lightning.diffusion.process import NoiseProcess
from ant_lightning.diffusion.samplers.base import Denoiser, Sampler, SampleStep, others_for
from ant_lightning.diffusion.samplers.schedulers import (
    discrete_scheduler,
    numpy_warnings_off,
    support_of,
)
from ant_lightning.errors import ConfigError, check_at_least

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    # For types only: the import takes seconds, and whoever passes a scheduler has done it.
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


class DiffusersSampler(Sampler):
    """Runs a scheduler of diffusers on its own spacing, with the noise levels of the process.

    - `DiscreteDiffusion`: DDIM, DEISMultistep, DPMSolverMultistep, DPMSolverSinglestep,
      EulerDiscrete, HeunDiscrete, PNDM, UniPCMultistep.
    - `FlowMatching` on the linear path: FlowMatchEulerDiscrete, FlowMatchHeunDiscrete,
      DEISMultistep, DPMSolverMultistep, DPMSolverSinglestep, UniPCMultistep.
    - `EDM` with EDM's preconditioning: EDMEuler, EDMDPMSolverMultistep.

    The states of its steps may be scaled (Euler and Heun of discrete diffusion keep
    `x_t / sqrt(abar_t)`), but the denoiser is always given the unscaled `x_t`. A learned variance
    is dropped. Predicted images are clipped by `clip_denoised`; the scheduler's own `clip_sample`
    is switched off. Timesteps between two whole ones are rounded if the scheduler accepts that and
    the process is discrete. The tables of diffusers are float32, so results agree with exact ones
    to about 1e-5, not 1e-9. Two habits of diffusers are kept: a static `shift` is applied twice to
    the last noise level of FlowMatchEuler, and EDM's schedulers start from noise times
    `sqrt(sigma_max² + 1)`. `ODESampler` and `EDMSampler` do neither.

    Args:
        scheduler: Its betas, number of timesteps, prediction type, `use_flow_sigmas` and
            `sigma_data` must have their defaults; they come from the process.
        num_steps: Steps of the scheduler; a second-order one calls the network twice in a step.
            `None` for 20, or as many as there are `sigmas`.
        sigmas: Noise levels of flow matching before the shift, decreasing, in place of the
            scheduler's own.
        mu: Strength of a dynamic shift, for a scheduler with `use_dynamic_shifting`.

    Raises:
        ConfigError: If the scheduler is not supported, draws noise of its own, or has a setting
            that belongs to the process; if `num_steps` is below 1 or above T; if `sigmas` or `mu`
            do not fit the scheduler. When sampling starts: if the scheduler is for another process.

    Reference:
        Lu et al., "DPM-Solver++", arXiv 2211.01095; Zhao et al., "UniPC", arXiv 2302.04867.

    Examples:
        >>> import torch
        >>> from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
        >>> from ant_lightning import DiffusersSampler, DiscreteDiffusion, FlowMatching
        >>> sampler = DiffusersSampler(UniPCMultistepScheduler(), num_steps=5)
        >>> process, x_T = DiscreteDiffusion(), torch.zeros(1, 3, 4, 4)
        >>> steps = sampler.trajectory(process, lambda x, t: torch.zeros_like(x), x_T)
        >>> [step.timestep for step in steps]
        [999, 799, 599, 400, 200]
        >>> sampler = DiffusersSampler(FlowMatchEulerDiscreteScheduler(), num_steps=4)
        >>> steps = sampler.trajectory(FlowMatching(), lambda x, t: torch.zeros_like(x), x_T)
        >>> [round(step.timestep, 3) for step in steps]
        [1.0, 0.667, 0.334, 0.001]
    """

    is_multistep: ClassVar = True

    def __init__(
        self,
        scheduler: SchedulerMixin,
        *,
        num_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        check_at_least(1, num_steps=num_steps)
        self._support = support_of(scheduler)
        self.scheduler = scheduler
        kind = type(scheduler).__name__
        if self.is_random and "variance_noise" not in self._support.accepts:
            raise ConfigError(
                "scheduler: must not draw noise of its own, found algorithm_type "
                f"{scheduler.config['algorithm_type']} of {kind}"
            )
        for name, value in (("sigmas", sigmas), ("mu", mu)):
            if value is not None and name not in self._support.accepts:
                raise ConfigError(
                    f"{name}: must be left out of {kind}, found {value}; None or null leaves it out"
                )
        if bool(scheduler.config.get("use_dynamic_shifting")) != (mu is not None):
            raise ConfigError(
                "mu: needed with use_dynamic_shifting of the scheduler and not without it, "
                f"found {mu}"
            )
        if sigmas is not None and num_steps not in (None, len(sigmas)):
            raise ConfigError(
                f"num_steps: must be the {len(sigmas)} sigmas, or left out, found {num_steps}"
            )
        self.sigmas = None if sigmas is None else [float(sigma) for sigma in sigmas]
        self.mu = mu
        self.num_steps = num_steps or (20 if sigmas is None else len(sigmas))

    @property
    def is_random(self) -> bool:
        """Whether the scheduler solves the stochastic differential equation."""
        config = self.scheduler.config
        sde = str(config.get("algorithm_type", "")).startswith("sde")
        return sde or bool(config.get("stochastic_sampling"))

    def num_calls(self, process: NoiseProcess) -> int:
        """Number of network calls on a whole path."""
        return len(self._prepared(process).timesteps)

    def check(self, process: NoiseProcess) -> None:
        """Check that this sampler can sample with the process."""
        if not isinstance(process, self._support.processes):
            kinds = " and ".join(each.__name__ for each in self._support.processes)
            raise ConfigError(
                f"sampler: must be one for {type(process).__name__}, found "
                f"{type(self.scheduler).__name__}, which is for {kinds}{others_for(process)}"
            )
        if isinstance(process, FlowMatching) and process.path != "linear":
            raise ConfigError(
                f"process.path: must be linear for the schedulers of diffusers, found "
                f"{process.path}; take ODESampler or SDESampler"
            )
        if isinstance(process, EDM) and not isinstance(process.preconditioning, EDMPreconditioning):
            raise ConfigError(
                "process.preconditioning: must be EDMPreconditioning for the schedulers of "
                f"diffusers, found {type(process.preconditioning).__name__}; take EDMSampler"
            )
        super().check(process)

    def _steps(
        self,
        process: NoiseProcess,
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
            x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
        # Otherwise the scheduler searches for its place by the value of the first timestep.
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first_step)
        # What the scheduler takes: flow matching's velocity is noise - data in diffusers too.
        taken = "v" if isinstance(process, FlowMatching) else process.prediction_type
        for index, timestep in list(enumerate(scheduler.timesteps))[first_step:]:
            if isinstance(process, DiscreteDiffusion):
                x_t = scheduler.scale_model_input(x, timestep)
                t = torch.full((len(x),), int(timestep), dtype=torch.int64, device=x.device)
                original: float = int(process.timestep_map[int(timestep)])
                told = torch.full_like(t, int(original))
            else:
                x_t, original = x, float(scheduler.sigmas[index])
                dtype = torch.float32 if x.device.type == "mps" else torch.float64
                t = told = torch.full((len(x),), original, dtype=dtype, device=x.device)
            prediction, _ = process.split_output(denoiser(x_t, told), x.shape[1])
            x_start = process.to_x_start(prediction, x_t, t)
            if clip_denoised:
                x_start = x_start.clamp(-1, 1)
                # The scheduler takes a prediction of the network's type: convert the clipped image.
                prediction = process.convert(taken, x_start, x_t, t, prediction_type="x0")
            else:
                prediction = process.convert(taken, prediction, x_t, t)
            x = self._stepped(scheduler, index, prediction, x, noise)
            yield SampleStep(index, original, x, x_start)

    def _stepped(
        self,
        scheduler: Any,  # noqa: ANN401 - a scheduler
        index: int,
        prediction: Tensor,
        x: Tensor,
        noise: Callable[[], Tensor] | None,
    ) -> Tensor:
        """The state after one step of the scheduler, with noise that the caller draws."""
        if scheduler.config.get("stochastic_sampling"):
            # This scheduler would draw from the global generator: its step, with our noise.
            assert noise is not None  # `trajectory` has checked it
            sigma, sigma_next = scheduler.sigmas[index], scheduler.sigmas[index + 1]
            x_start = x - float(sigma) * prediction
            return (1 - float(sigma_next)) * x_start + float(sigma_next) * noise()
        # Otherwise the scheduler would draw from the global generator.
        options = {"variance_noise": noise()} if noise and self.is_random else {}
        if isinstance(getattr(scheduler, "is_scale_input_called", None), bool):
            scheduler.is_scale_input_called = True  # the network's scale is the process' part
        timestep = scheduler.timesteps[index]
        with numpy_warnings_off():
            stepped = scheduler.step(prediction, timestep, x, return_dict=False, **options)[0]
        assert isinstance(stepped, Tensor)
        return stepped

    def _prepared(self, process: NoiseProcess) -> Any:  # noqa: ANN401 - a scheduler
        """A new scheduler, since schedulers have state, with the noise levels of the process."""
        if isinstance(process, DiscreteDiffusion):
            return discrete_scheduler(self.scheduler, process, self.num_steps)
        options: dict[str, Any] = {}
        if isinstance(process, EDM):
            assert isinstance(process.preconditioning, EDMPreconditioning)  # `check` says so
            options["sigma_data"] = process.preconditioning.sigma_data
        elif "use_flow_sigmas" in self.scheduler.config:
            options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        spacing = {"sigmas": self.sigmas, "mu": self.mu}
        with numpy_warnings_off():
            scheduler = self.scheduler.from_config(self.scheduler.config, **options)
            scheduler.set_timesteps(
                self.num_steps, **{k: v for k, v in spacing.items() if v is not None}
            )
        return scheduler
