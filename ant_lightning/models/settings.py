"""The groups of settings of a diffusion module; each group checks its own fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import Optimizer

from ant_lightning.balancing.auto import EngineName
from ant_lightning.balancing.base import Balancer
from ant_lightning.diffusion.edm import EDM
from ant_lightning.diffusion.flow import FlowMatching
from ant_lightning.diffusion.guidance import check_interval
from ant_lightning.diffusion.proposals import CellProposal
from ant_lightning.diffusion.samplers.base import Sampler
from ant_lightning.diffusion.samplers.ddim import DDPM
from ant_lightning.diffusion.samplers.edm import EDMSampler
from ant_lightning.diffusion.samplers.ode import ODESampler
from ant_lightning.errors import ConfigError, check_at_least, check_instance
from ant_lightning.tasks.clusterings import Clustering

if TYPE_CHECKING:
    from ant_lightning.diffusion.process import NoiseProcess
    from ant_lightning.tasks.clusters import TimestepClusters


def adamw(groups: Any) -> Optimizer:  # noqa: ANN401 - parameters, or groups of them
    """The default optimizer: AdamW, learning rate 1e-4, no weight decay, as in the official DiT."""
    return torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.0)


@dataclass(frozen=True)
class Tasks:
    """What the tasks are, how they are weighted, and how their gradients are computed.

    Args:
        clustering: Groups the timesteps into tasks; without a balancer, for reporting only.
        balancer: Weights the tasks; `None` for vanilla training.
        weighting: Prior weights of the tasks: `equal`, or `by_size`, `|I_i| / T`.
        engine: How task gradients are computed: `loop`, `one_pass`, `low_memory`, or
            `auto`, which takes `one_pass` where it is faster than `loop` and fits the network.
        placement: Which ranks compute which tasks. `spread` gives each rank samples of all tasks;
            with `sorted` a rank has few tasks and sends only their gradients (for gradient
            balancers on many ranks).

    Raises:
        ConfigError: If `clustering` or `balancer` is another kind of object, or `placement` does
            not fit the balancer or the engine.

    Examples:
        >>> from ant_lightning import SNRClustering, Tasks, UncertaintyWeighting
        >>> tasks = Tasks(SNRClustering(num_tasks=5), balancer=UncertaintyWeighting(num_tasks=5))
        >>> tasks.weighting, tasks.engine, tasks.placement
        ('equal', 'auto', 'spread')
    """

    clustering: Clustering
    _: KW_ONLY
    balancer: Balancer | None = None
    weighting: Literal["equal", "by_size"] = "equal"
    engine: EngineName = "auto"
    placement: Literal["spread", "sorted"] = "spread"

    def __post_init__(self) -> None:
        check_instance(Clustering, "SNRClustering(num_tasks=5)", clustering=self.clustering)
        if self.balancer is not None:
            check_instance(Balancer, "UncertaintyWeighting(num_tasks=5)", balancer=self.balancer)
        if self.placement == "spread":
            return
        if self.balancer is None or not self.balancer.needs_gramian:
            raise ConfigError(
                "placement: must be 'spread' without a gradient balancer, because 'sorted' saves "
                f"traffic of task gradients, found {self.placement!r} with "
                f"{type(self.balancer).__name__}"
            )
        if self.engine == "low_memory":
            raise ConfigError(
                "placement: must be 'spread' with engine 'low_memory', which holds no task "
                f"gradients to send, found {self.placement!r}"
            )

    def clusters(self, process: NoiseProcess, size: tuple[int, int]) -> TimestepClusters:
        """The clusters of the process' noise axis, for images of this height and width."""
        clustering = self.clustering
        if clustering.weighted:  # only these need the density
            clustering = clustering.with_density(process.for_size(*size).density)
        return clustering(process.log_snr)


@dataclass(frozen=True)
class TimestepSampling:
    """How the timesteps of a training batch are drawn.

    Args:
        method: `stratified` draws a fixed share for each task; `uniform` draws uniformly over t.
            Default: `stratified` with a balancer, `uniform` without.
        allocation: Images of each task in a stratified batch: `equal`, or `proportional` to the
            size of its cluster.
        interval: `[start, stop)`: train on these timesteps only (a specialist).
        proposal: Draws by importance in place of the process' own density (`LossSecondMoment`,
            `SpeeD`): baselines, for `uniform` draws.

    Raises:
        ConfigError: If the interval is empty, or the method is `stratified` with an interval or a
            proposal.

    Examples:
        >>> from ant_lightning import TimestepSampling
        >>> TimestepSampling(interval=(0, 200)).interval
        (0, 200)
    """

    method: Literal["stratified", "uniform"] | None = None
    _: KW_ONLY
    allocation: Literal["equal", "proportional"] = "equal"
    interval: tuple[int, int] | None = None
    proposal: CellProposal | None = None

    def __post_init__(self) -> None:
        if self.proposal is not None and self.method == "stratified":
            raise ConfigError(
                "method: must be 'uniform' with a proposal, which replaces the shares of the "
                "tasks, found 'stratified'"
            )
        if self.interval is None:
            return
        start, stop = self.interval
        if not 0 <= start < stop:
            raise ConfigError(f"interval: must satisfy 0 <= start < stop, found [{start}, {stop}]")
        if self.method == "stratified":
            raise ConfigError(
                "method: must be 'uniform' with an interval, because a specialist has one task, "
                "found 'stratified'"
            )


@dataclass(frozen=True)
class Optimization:
    """How the weights are optimised.

    Training uses Lightning's manual optimization, so clipping and accumulation are set here and
    not in the Trainer.

    Args:
        optimizer: Makes the optimizer from parameter groups; default AdamW, learning rate 1e-4.
        lr_scheduler: Makes the scheduler from the optimizer; stepped after every optimizer step.
        warmup_steps: Number of steps in which the learning rate grows linearly from 0.
        clip_grad_norm: Largest norm of the backbone's gradient; `None` for no clipping.
        accumulate_grad_batches: Parts into which the images of a step are split, to save memory.
        max_skipped_steps: Steps in a row that may be skipped because of a NaN or an infinity.
        param_groups: Puts the network's parameters, pairs of name and parameter, into groups of the
            optimizer, such as `NamedGroups` and `MuonGroups`. All are clipped by one norm, and
            follow the scheduler. Default: one group.

    Raises:
        ConfigError: If a setting is out of range, or there is a warm-up beside a scheduler.

    Examples:
        >>> from ant_lightning import Optimization
        >>> Optimization(warmup_steps=1000).clip_grad_norm
        1.0
    """

    optimizer: OptimizerCallable = adamw
    _: KW_ONLY
    lr_scheduler: LRSchedulerCallable | None = None
    warmup_steps: int = 0
    clip_grad_norm: float | None = 1.0
    accumulate_grad_batches: int = 1
    max_skipped_steps: int = 10
    param_groups: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        check_at_least(
            1,
            accumulate_grad_batches=self.accumulate_grad_batches,
            max_skipped_steps=self.max_skipped_steps,
        )
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ConfigError(
                f"clip_grad_norm: must be above 0, or None for none, found {self.clip_grad_norm}"
            )
        check_at_least(0, warmup_steps=self.warmup_steps)
        if self.warmup_steps and self.lr_scheduler is not None:
            raise ConfigError(
                f"warmup_steps: must be 0 with an lr_scheduler, found {self.warmup_steps}"
            )


@dataclass(frozen=True)
class Sampling:
    """How images are drawn from noise.

    Args:
        sampler: One for the process. By default `DDPM(num_steps=250)` for discrete diffusion,
            `ODESampler(num_steps=50)` for flow matching, `EDMSampler(num_steps=18)` for EDM.
        guidance_scale: Scale of guidance; 1 means no guidance.
        guided_channels: Channels that guidance changes; `None` for all (official DiT: 3).
        guidance_interval: Guide only at noise levels `sigma = s / a` in `(low, high]`; `None` for
            all. See `GuidedDenoiser`.
        guide_checkpoint: Checkpoint of a weaker network that takes the place of the null class
            (autoguidance): an earlier one of the same run, or that of a smaller network.
        guide_backbone: The network of `guide_checkpoint`, if it is not the backbone's kind and
            size.
        guide_weights: Which weights of `guide_checkpoint`: `ema` or `model`.
        clip_denoised: Whether predicted images are clipped to [-1, 1] in every step; by default
            pixels are and latents are not.

    Raises:
        ConfigError: If the interval is empty, or a network has no checkpoint.

    Examples:
        >>> from ant_lightning import DDIM, Sampling
        >>> Sampling(DDIM(num_steps=50), guidance_scale=1.5).sampler.num_steps
        50
    """

    sampler: Sampler | None = None
    _: KW_ONLY
    guidance_scale: float = 1.0
    guided_channels: int | None = None
    guidance_interval: tuple[float, float] | None = None
    guide_checkpoint: str | None = None
    guide_backbone: nn.Module | None = None
    guide_weights: Literal["ema", "model"] = "ema"
    clip_denoised: bool | None = None

    def __post_init__(self) -> None:
        if self.guidance_interval is not None:
            check_interval(self.guidance_interval, name="guidance_interval")
        if self.guide_backbone is not None and self.guide_checkpoint is None:
            raise ConfigError(
                "guide_checkpoint: needed with a guide_backbone, whose weights are random, "
                f"found None with {type(self.guide_backbone).__name__}"
            )

    def sampler_for(self, process: NoiseProcess) -> Sampler:
        """The sampler, which must fit the process; by default that of the process' paper.

        Raises:
            ConfigError: If the sampler does not fit.
        """
        if self.sampler is None:
            if isinstance(process, FlowMatching):
                return ODESampler(num_steps=50, method="heun")
            return EDMSampler(num_steps=18) if isinstance(process, EDM) else DDPM(num_steps=250)
        try:
            self.sampler.check(process)
        except ConfigError as error:
            # Not an argument of the sampler's own: the sampler or the process does not fit.
            if str(error).startswith("sampler: "):
                raise ConfigError(f"sampling.{error}") from error
            if str(error).startswith("process."):
                raise ConfigError(str(error)) from error
            raise
        return self.sampler
