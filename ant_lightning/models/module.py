"""The LightningModule in which every diffusion model and every multi-task method trains."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ant_lightning.balancing.backward import BackwardReport, multitask_backward, task_gradients
from ant_lightning.balancing.base import Balancer, SampleBalancer
from ant_lightning.balancing.engines import Engine
from ant_lightning.balancing.gradients import DenseTaskGradients
from ant_lightning.balancing.reduction import default_reduction
from ant_lightning.balancing.shards import local_part
from ant_lightning.data.batch import check_batch
from ant_lightning.diffusion.process import DiffusionProcess
from ant_lightning.diffusion.samplers.sampler import Sampler
from ant_lightning.diffusion.samplers.sampling import DDPM
from ant_lightning.diffusion.schedules import NoiseSchedule
from ant_lightning.diffusion.weighting import LossWeighting
from ant_lightning.errors import ConfigError, NonFiniteError
from ant_lightning.models.checkpoint_content import use_names_of
from ant_lightning.models.checks import (
    check_settings,
    check_strategy,
    check_trainer,
    warn_of_other_model,
)
from ant_lightning.models.denoiser import DiffusionModule, Draws
from ant_lightning.models.draws import dropped_labels, sample_shares, spread_order, step_noise
from ant_lightning.models.engine import EngineName, engine_and_rows
from ant_lightning.models.first_stage.first_stage import FirstStage
from ant_lightning.models.freezing import TrainedParameters
from ant_lightning.models.latents import bind_data, load_initial_weights, restore_latent_space
from ant_lightning.models.optimizers import (
    forget_balancers_schedule,
    make_optimizer,
    make_scheduler,
    planned_steps,
    step_scheduler,
)
from ant_lightning.models.protocol import check_backbone
from ant_lightning.models.resume import optimization_settings, resume_with_settings
from ant_lightning.models.running_statistics import RunningStatistics
from ant_lightning.models.saved_state import restore_state, saved_state
from ant_lightning.models.scaling import back_off, gradient_scaler, loss_scale
from ant_lightning.randomness import keyed_generator, keyed_seed, run_seed
from ant_lightning.runtime.rank_agreement import check_ranks_agree
from ant_lightning.tasks.clusterings import Clustering
from ant_lightning.tasks.clusters import TimestepClusters

if TYPE_CHECKING:
    from collections.abc import Mapping

    import lightning as L
    from torch import Tensor
    from torch.optim import Optimizer

    from ant_lightning.data.batch import Batch

__all__ = ["MultiTaskDiffusion"]

# State that training changes besides the weights.
_OF_RUN = (
    "clusters",
    "cluster_history",
    "init_due",
    "latent_space",
    "num_skipped_in_a_row",
    "num_skipped_steps",
    "trained_steps",
)


class MultiTaskDiffusion(DiffusionModule):
    """A diffusion model trained on clusters of timesteps as tasks.

    One optimization step serves every method: draw timesteps, let `multitask_backward` fill the
    gradients, clip, step. It is manual optimization, so clipping and accumulation are arguments
    here and not of the Trainer.

    Args:
        backbone: The network, called as `backbone(x_t, timesteps, labels)`.
        schedule: Noise schedule.
        clustering: How the timesteps are grouped; without a balancer, only for reporting.
        prediction_type: What the network predicts.
        variance_type: Variance of the reverse steps; with `learned_range` the network has twice
            the channels and the loss is the hybrid one.
        balancer: How the tasks are weighted; None for vanilla training.
        loss_weighting: Weight of each timestep inside its task (MinSNR, P2).
        timestep_sampling: `stratified` draws the share of each cluster, `uniform` ignores the
            clusters. Default: stratified with a balancer, uniform without.
        allocation: Images of each task in a stratified batch: `equal`, or `proportional` to the
            cluster's size.
        placement: Which ranks compute which tasks: `spread` gives each rank samples of all; with
            `sorted` a rank has few tasks and sends only their gradients (for gradient balancers
            on many ranks).
        task_weighting: Priors of the tasks: `equal`, or `by_size`.
        engine: How task gradients are computed: `loop`, `one_pass`, `vmap`, `low_memory`, or
            `auto`: `one_pass` where the loop would take longer and the network fits, else `loop`.
        optimizer: Made with the parameter groups; AdamW with learning rate 1e-4 by default.
        lr_scheduler: Made with the optimizer, stepped after every optimizer step.
        warmup_steps: Steps in which the learning rate grows linearly from 0.
        clip_grad_norm: Largest norm of the backbone's gradient; None for no clipping.
        accumulate_grad_batches: Parts in which the images of a step are computed.
        class_dropout: Share of labels replaced by the null class, for guidance.
        sampler: How images are drawn from noise.
        guidance_scale: Classifier-free guidance of the images that are drawn; 1 is none.
        guided_channels: Channels that guidance touches; None for all (official DiT: 3).
        clip_denoised: Whether predicted images are clipped to [-1, 1] while sampling; by default
            pixels are and latents are not.
        first_stage: Autoencoder whose latents are denoised; None for pixels.
        init_from: Official checkpoint that the backbone starts from. A checkpoint that is loaded
            later replaces its weights, and then the file need not be there any more.
        init_weights: Which of its weights, if it has both: the averages or the live ones.
        train_interval: `[start, stop)`: train on these timesteps alone (a specialist).
        max_skipped_steps: Steps in a row that may be skipped for a NaN or an infinity.
        seed: Seed of timesteps, noise and dropout; by default that of `seed_everything`.

    Raises:
        ConfigError: If settings contradict each other.
        NonFiniteError: In training, after `max_skipped_steps` skipped steps in a row.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", arXiv 2306.00354.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        schedule: NoiseSchedule,
        clustering: Clustering,
        prediction_type: Literal["eps", "x0", "v"] = "eps",
        variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small",
        balancer: Balancer | None = None,
        loss_weighting: LossWeighting | None = None,
        timestep_sampling: Literal["uniform", "stratified"] | None = None,
        allocation: Literal["equal", "proportional"] = "equal",
        placement: Literal["spread", "sorted"] = "spread",
        task_weighting: Literal["equal", "by_size"] = "equal",
        engine: EngineName = "auto",
        optimizer: OptimizerCallable = lambda groups: torch.optim.AdamW(
            groups, lr=1e-4, weight_decay=0.0
        ),
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        clip_grad_norm: float | None = 1.0,
        accumulate_grad_batches: int = 1,
        class_dropout: float = 0.0,
        sampler: Sampler | None = None,
        guidance_scale: float = 1.0,
        guided_channels: int | None = None,
        clip_denoised: bool | None = None,
        first_stage: FirstStage | None = None,
        init_from: str | None = None,
        init_weights: Literal["ema", "model"] = "ema",
        train_interval: tuple[int, int] | None = None,
        max_skipped_steps: int = 10,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_backbone(backbone)
        self.automatic_optimization = False
        self.backbone = backbone
        self.process = DiffusionProcess(
            schedule, prediction_type=prediction_type, variance_type=variance_type
        )
        warn_of_other_model(clustering, backbone)
        self.first_clusters: TimestepClusters = clustering(self.process.log_snr)
        self.clusters = self.first_clusters
        self.cluster_history = [(0, self.clusters.boundaries)]  # by the steps that were made before
        self.balancer = balancer
        self.timestep_sampling = timestep_sampling or ("stratified" if balancer else "uniform")
        self.allocation: Literal["equal", "proportional"] = allocation
        self.placement = placement
        self.task_weighting = task_weighting
        self.engine = engine
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup_steps = warmup_steps
        self.clip_grad_norm = clip_grad_norm
        self.accumulate_grad_batches = accumulate_grad_batches
        self.class_dropout = class_dropout
        self.sampler = sampler or DDPM(num_steps=250)
        self.guidance_scale = guidance_scale
        self.guided_channels = guided_channels
        self._clip_denoised = clip_denoised
        self.first_stage = first_stage
        self.latent_space = None if first_stage is None else first_stage.space
        self.init_from = init_from
        self.init_weights: Literal["ema", "model"] = init_weights
        self.init_due = init_from is not None
        self.train_interval = train_interval
        self.max_skipped_steps = max_skipped_steps
        self.seed = run_seed(seed)
        self._weights = (
            loss_weighting(self.process.snr, prediction_type) if loss_weighting else None
        )
        self.last_report: BackwardReport | None = None
        self.last_step_skipped = False
        self.num_skipped_steps = 0
        self.num_skipped_in_a_row = 0
        self.trained_steps = 0  # steps that trained the weights, for evaluations
        self._engine: Engine | None = None
        self._row_buffers: DenseTaskGradients | None = None
        self._trained = TrainedParameters()
        self._validation_sums = torch.zeros(0)
        if sampler is not None:
            sampler.num_calls(self.process)  # refuses what the schedule has no timesteps for
        check_settings(self)
        if init_from is not None and Path(init_from).is_file():
            load_initial_weights(self)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own loose type
        """The backbone's parameters in one group, the balancer's own in another."""
        load_initial_weights(self)
        groups = [self._trained.begin(self.backbone), self._own_parameters]
        optimizer, scheduler = self.make_optimization([{"params": each} for each in groups if each])
        return optimizer if scheduler is None else ([optimizer], [scheduler])

    def make_optimization(self, groups: list[dict[str, Any]]) -> tuple[Optimizer, Any]:
        """Optimizer and scheduler (or None) of a backbone group and, if given, a balancer group."""
        if len(groups) > 1:
            groups[1] |= {"lr": self.balancer.lr, "weight_decay": 0.0}  # type: ignore[union-attr]
        optimizer = make_optimizer(self.optimizer, groups)
        factory, steps = self.lr_scheduler, self.warmup_steps
        if steps:
            factory = partial(LambdaLR, lr_lambda=lambda step: min(1.0, (step + 1) / steps))
        if factory is None:
            return optimizer, None
        num_steps = None if self._trainer is None else planned_steps(self._trainer)
        return optimizer, make_scheduler(factory, optimizer, self.optimizer, num_steps=num_steps)

    @property
    def _own_parameters(self) -> list[nn.Parameter]:
        return [] if self.balancer is None else list(self.balancer.parameters())

    def _optimization_settings(self) -> dict[str, Any]:
        num_groups = 1 + bool(self._own_parameters)
        return optimization_settings(
            self.make_optimization, num_groups, warmup_steps=self.warmup_steps
        )

    def denoise(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        """As in the base class, but load `init_from` first if that is still due."""
        load_initial_weights(self)
        return super().denoise(x_t, timesteps, labels)

    def setup(self, stage: str) -> None:
        """Refuse, before anything is wrapped or moved, a strategy or data that do not fit."""
        if stage == "fit":
            check_strategy(self.trainer.strategy)
            if self.global_step == 0:
                self._begin_run()
        if stage != "predict":
            bind_data(self)

    def on_fit_start(self) -> None:
        """Refuse, before the first step, what manual optimization cannot honour."""
        check_trainer(self)
        self._engine, self._row_buffers = engine_and_rows(self)

    def draw(self, batch: Batch, *, step: int) -> Draws:
        """Timesteps, tasks, noise and dropped labels of a training step, a function of its number.

        They are those of the global batch, of which each rank takes its part. With the placement
        `spread` the same images get the same draws on any number of ranks, and the part of each
        rank has its share of each task. With `sorted` a part has as few tasks as can be, and the
        parts go round among the ranks, so that no task is bound to a rank's images.
        """
        b, device = len(batch.images), batch.images.device
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        mine = slice(rank * b, (rank + 1) * b)
        generator = keyed_generator(self.seed, "timesteps", step)
        if self.timestep_sampling == "stratified":
            timesteps, tasks = self.clusters.sample(
                b * ranks, generator=generator, allocation=self.allocation
            )
            if self.placement == "sorted":
                part = (rank + step) % ranks
                order = torch.arange(part * b, (part + 1) * b)
            else:
                order = spread_order(b * ranks)[mine]
            timesteps, tasks = timesteps[order], tasks[order]
        else:
            start, stop = self.train_interval or (0, self.clusters.num_timesteps)
            timesteps = torch.randint(start, stop, (b * ranks,), generator=generator)[mine]
            tasks = self.clusters.task_of(timesteps)
        noise = step_noise(mine, self.image_shape, self.seed, step, device)
        null, share = self.null_class, self.class_dropout
        labels = dropped_labels(batch.labels, null, share, mine, self.seed, step)
        timesteps = timesteps.to(device, non_blocking=True)
        return Draws(timesteps, tasks, noise, labels if self.num_classes else None)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """One step of any method.

        Raises:
            ConfigError: If the loader does not give a `Batch` that fits the backbone.
        """
        check_batch(batch)
        # For what the network itself draws: dropout.
        torch.manual_seed(keyed_seed(self.seed, "network", self.global_step, self.global_rank))
        draws = self.draw(batch, step=self.global_step)
        unweighted = torch.zeros(len(batch.images), device=self.device, dtype=torch.float32)
        log_snr = None
        if isinstance(self.balancer, SampleBalancer):
            log_snr = self.process.log_snr.to(self.device, non_blocking=True)[draws.timesteps]
        x_start = self.encode(batch, step=self.global_step)
        statistics = RunningStatistics(self.backbone)
        report = multitask_backward(
            statistics.once(self.losses(x_start, draws, unweighted=unweighted)),
            draws.tasks,
            self._trained.follow(self.backbone, self.trainer.optimizers[0]),
            self.balancer,
            num_tasks=self.num_tasks,
            priors=self._priors(),
            micro_batch_size=-(-len(batch.images) // self.accumulate_grad_batches),
            engine=self._engine,
            gradients=self._row_buffers,
            loss_scale=loss_scale(gradient_scaler(self.trainer), self.device),
            log_snr=log_snr,
        )
        statistics.keep() if report.finite else statistics.restore()
        self._finish_step(report)
        loss = unweighted.mean()  # at uniform timesteps, whatever they were drawn from
        if self.timestep_sampling == "stratified":
            shares = sample_shares(self.clusters.sizes, report.num_samples, self.allocation)
            tasks = draws.tasks.to(shares.device, non_blocking=True)
            loss = (unweighted * shares[tasks]).sum().float() * self.trainer.world_size
        self.last_report = report
        if self.log_due:
            loss = default_reduction().all_reduce_(loss.detach()) / self.trainer.world_size
            self.log("train/loss", loss, prog_bar=True, logger=False)
            self.log_now(
                {
                    "train/loss": loss,
                    "train/objective": report.objective,
                    "train/grad_norm": report.grad_norm,
                    "train/skipped_steps": self.num_skipped_steps,
                }
            )
        return {"loss": loss}

    @property
    def log_due(self) -> bool:
        """Whether the step just made is one of every `trainer.log_every_n_steps`."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.global_step % max(1, every) == 0

    def log_now(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Send numbers to the loggers at this optimizer step, skipped steps not counted.

        `self.log` keeps to batches, and loses what is logged off its own rhythm.
        """
        for logger in self.loggers:
            logger.log_metrics({k: float(v) for k, v in metrics.items()}, step=self.global_step)

    def task_gradients(self, batch: Batch, *, step: int) -> DenseTaskGradients:
        """The task gradients at the current weights on the draws of `step`, for looking at."""
        draws = self.draw(batch, step=step)
        statistics = RunningStatistics(self.backbone)
        losses = statistics.once(self.losses(self.encode(batch, step=step), draws))
        shared = self.backbone.parameters()
        found = task_gradients(losses, draws.tasks, shared, num_tasks=self.num_tasks)
        statistics.restore()
        return found

    def recluster(self, clusters: TimestepClusters) -> None:
        """Go on with other clusters; task i keeps its number, its weight and its curves.

        Every rank must be given the same.

        Raises:
            ConfigError: If it is another number of tasks or of timesteps.
        """
        for name in ("num_tasks", "num_timesteps"):
            now, then = getattr(clusters, name), getattr(self.clusters, name)
            if now != then:
                raise ConfigError(f"clusters: {name} must stay {then}, found {now}")
        self.clusters = clusters
        self.cluster_history.append((self.global_step, clusters.boundaries))

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Update `trained_steps`."""
        self.trained_steps = self.global_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what no hyperparameter file should decide: clusters and counts.

        Raises:
            DivergedRanksError: On every rank, if they no longer agree.
        """
        check_ranks_agree(self)
        space = self.latent_space and asdict(self.latent_space)
        state = {**saved_state(self), "latent_space": space}
        if self.trainer.state.fn == "fit":
            state["optimization"] = self._optimization_settings()
        state["trained"] = self._trained.state(self.backbone)
        checkpoint.setdefault("ant_lightning", {}).update(state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the checkpoint with the settings and name what differs."""
        use_names_of(self, checkpoint)
        forget_balancers_schedule(checkpoint)
        restore_state(self, checkpoint)
        restore_latent_space(self, checkpoint["ant_lightning"].get("latent_space"))
        self.init_due = False
        if self._trainer is not None and self.trainer.state.fn == "fit":
            resume_with_settings(self, checkpoint, self._optimization_settings())
            self._trained.load(checkpoint["ant_lightning"].get("trained"))

    def hand_back(self, trainer: L.Trainer) -> dict[str, Any]:
        """In a child process: the state that training changed besides the weights."""
        fitted = trainer.state.fn == "fit"  # otherwise the parent's weights are unchanged
        return {name: getattr(self, name) for name in _OF_RUN if fitted}

    def take_back(self, state: dict[str, Any], pl_module: L.LightningModule) -> None:
        """In the parent: take over the state that training in the child changed."""
        vars(self).update(state)

    def _begin_run(self) -> None:
        """Reset the counts of an earlier run, but keep its weights and clusters."""
        first = self.cluster_history[0]  # from the settings: checkpoints must agree with it
        now = (0, self.clusters.boundaries)
        self.cluster_history = [first] if now == first else [first, now]
        self.num_skipped_steps = 0
        self.num_skipped_in_a_row = 0

    def _finish_step(self, report: BackwardReport) -> None:
        """Clip and step, or skip."""
        self.last_step_skipped = not report.finite
        if not report.finite:
            self._skip_step(report)
            return
        self.num_skipped_in_a_row = 0
        if self.clip_grad_norm is not None:
            grads = [local_part(p.grad) for p in self.backbone.parameters() if p.grad is not None]
            factor = (self.clip_grad_norm / (report.grad_norm + 1e-6)).clamp(max=1.0)
            # At least float32: the first parameter may be bfloat16 and others not.
            dtype = torch.promote_types(grads[0].dtype, torch.float32)
            torch._foreach_mul_(grads, factor.to(dtype))
        optimizer = self.optimizers()
        optimizer.step()  # type: ignore[union-attr]
        scheduler = self.lr_schedulers()
        if scheduler is not None:
            step_scheduler(scheduler)

    def _skip_step(self, report: BackwardReport) -> None:
        """Count a step that is not made; give up after too many in a row."""
        self.num_skipped_steps += 1
        scaler = gradient_scaler(self.trainer)
        if scaler is not None:
            back_off(scaler, self.optimizers(use_pl_optimizer=False))  # type: ignore[arg-type]
            if scaler.get_scale() >= 1:
                return  # an overflow, as far as anybody knows: the next step has a smaller scale
        self.num_skipped_in_a_row += 1
        if self.num_skipped_in_a_row >= self.max_skipped_steps:
            raise NonFiniteError(
                f"model.max_skipped_steps: {self.num_skipped_in_a_row} steps in a row had a NaN "
                f"or an infinity; losses per task {report.task_losses.tolist()}"
            )

    def _priors(self) -> Tensor | None:
        if self.balancer is None or self.task_weighting == "equal":
            return None
        return self.clusters.sizes.double() / self.clusters.num_timesteps
