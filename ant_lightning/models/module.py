"""The LightningModule in which every diffusion model and every multi-task method trains."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ant_lightning.balancing.backward import BackwardReport, multitask_backward, task_gradients
from ant_lightning.balancing.base import SampleBalancer
from ant_lightning.balancing.engines import Engine
from ant_lightning.balancing.gradients import DenseTaskGradients
from ant_lightning.balancing.linear import LinearScalarization
from ant_lightning.balancing.reduction import default_reduction
from ant_lightning.balancing.shards import local_part
from ant_lightning.data.batch import check_batch
from ant_lightning.diffusion.process import DiscreteDiffusion
from ant_lightning.diffusion.samplers.ddim import DDPM
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
from ant_lightning.models.engine import engine_and_rows
from ant_lightning.models.first_stage.first_stage import FirstStage
from ant_lightning.models.freezing import TrainedParameters
from ant_lightning.models.latents import bind_data, load_initial_weights, restore_latent_space
from ant_lightning.models.optimizers import (
    OptimizerFactory,
    forget_balancers_schedule,
    say_changed,
)
from ant_lightning.models.protocol import check_backbone
from ant_lightning.models.running_statistics import RunningStatistics
from ant_lightning.models.saved_state import restore_state, saved_state
from ant_lightning.models.scaling import back_off, gradient_scaler, loss_scale
from ant_lightning.models.settings import Optimization, Sampling, Tasks, TimestepSampling
from ant_lightning.randomness import keyed_generator, keyed_seed, run_seed
from ant_lightning.runtime.rank_agreement import check_ranks_agree
from ant_lightning.tasks.clusters import TimestepClusters

if TYPE_CHECKING:
    from collections.abc import Mapping

    import lightning as L
    from torch import Tensor

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
        process: Noise schedule, meaning of the network's output and weights of the loss.
        tasks: What the tasks are and how they are balanced.
        timesteps: How timesteps are drawn in training.
        optimization: How the weights are optimised.
        sampling: How images are drawn from noise.
        class_dropout: Share of labels replaced by the null class, for guidance.
        first_stage: Autoencoder whose latents are denoised; None for pixels.
        init_from: Official checkpoint that the backbone starts from. A checkpoint that is loaded
            later replaces its weights, and then the file need not be there any more.
        init_weights: Which of its weights, if it has both: the averages or the live ones.
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
        process: DiscreteDiffusion,
        tasks: Tasks,
        timesteps: TimestepSampling = TimestepSampling(),
        optimization: Optimization = Optimization(),
        sampling: Sampling = Sampling(),
        class_dropout: float = 0.0,
        first_stage: FirstStage | None = None,
        init_from: str | None = None,
        init_weights: Literal["ema", "model"] = "ema",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_backbone(backbone)
        self.automatic_optimization = False
        self.backbone = backbone
        self.process = process
        warn_of_other_model(tasks.clustering, backbone)
        self.first_clusters: TimestepClusters = tasks.clustering(process.log_snr)
        self.clusters = self.first_clusters
        self.cluster_history = [(0, self.clusters.boundaries)]  # by the steps that were made before
        self.balancer = tasks.balancer
        self.tasks = tasks
        specialist = timesteps.interval is not None
        by_default = "uniform" if tasks.balancer is None or specialist else "stratified"
        method: Any = timesteps.method or by_default
        self.timesteps = replace(timesteps, method=method)
        self.optimization = optimization
        self.sampling = sampling
        self.optimizer_factory = OptimizerFactory(
            optimization, path="optimization.", balancer=tasks.balancer
        )
        self.class_dropout = class_dropout
        self.sampler = sampling.sampler or DDPM(num_steps=250)
        self.guidance_scale = sampling.guidance_scale
        self.first_stage = first_stage
        self.latent_space = None if first_stage is None else first_stage.space
        self.init_from = init_from
        self.init_weights: Literal["ema", "model"] = init_weights
        self.init_due = init_from is not None
        self.seed = run_seed(seed)
        self.last_report: BackwardReport | None = None
        self.last_step_skipped = False
        self.num_skipped_steps = 0
        self.num_skipped_in_a_row = 0
        self.trained_steps = 0  # steps that trained the weights, for evaluations
        self._engine: Engine | None = None
        self._row_buffers: DenseTaskGradients | None = None
        self._trained = TrainedParameters()
        self._validation_sums = torch.zeros(0)
        if sampling.sampler is not None:
            sampling.sampler.num_calls(
                self.process
            )  # refuses what the schedule has no timesteps for
        check_settings(self)
        if init_from is not None and Path(init_from).is_file():
            load_initial_weights(self)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own loose type
        """The backbone's parameters in one group, the balancer's own in another."""
        load_initial_weights(self)
        groups = [self._trained.begin(self.backbone), self._own_parameters]
        named = [{"params": each} for each in groups if each]
        steps = None if self._trainer is None else _planned_steps(self._trainer)
        optimizer, scheduler = self.optimizer_factory.make(named, num_steps=steps)
        return optimizer if scheduler is None else ([optimizer], [scheduler])

    @property
    def _own_parameters(self) -> list[nn.Parameter]:
        return [] if self.balancer is None else list(self.balancer.parameters())

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
        if self.timesteps.method == "stratified":
            timesteps, tasks = self.clusters.sample(
                b * ranks, generator=generator, allocation=self.timesteps.allocation
            )
            if self.tasks.placement == "sorted":
                part = (rank + step) % ranks
                order = torch.arange(part * b, (part + 1) * b)
            else:
                order = spread_order(b * ranks)[mine]
            timesteps, tasks = timesteps[order], tasks[order]
        else:
            start, stop = self.timesteps.interval or (0, self.clusters.num_timesteps)
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
            micro_batch_size=-(-len(batch.images) // self.optimization.accumulate_grad_batches),
            engine=self._engine,
            gradients=self._row_buffers,
            loss_scale=loss_scale(gradient_scaler(self.trainer), self.device),
            log_snr=log_snr,
        )
        statistics.keep() if report.finite else statistics.restore()
        self._finish_step(report)
        loss = unweighted.mean()  # at uniform timesteps, whatever they were drawn from
        if self.timesteps.method == "stratified":
            shares = sample_shares(
                self.clusters.sizes, report.num_samples, self.timesteps.allocation
            )
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
            state["optimization"] = self.optimizer_factory.described()
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
            _use_old_keys(checkpoint)
            self._keep_fixed_weights(checkpoint)
            self.optimizer_factory.resume(self.trainer, checkpoint)
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
        if self.optimization.clip_grad_norm is not None:
            grads = [local_part(p.grad) for p in self.backbone.parameters() if p.grad is not None]
            factor = (self.optimization.clip_grad_norm / (report.grad_norm + 1e-6)).clamp(max=1.0)
            # At least float32: the first parameter may be bfloat16 and others not.
            dtype = torch.promote_types(grads[0].dtype, torch.float32)
            torch._foreach_mul_(grads, factor.to(dtype))
        optimizer = self.optimizers()
        optimizer.step()  # type: ignore[union-attr]
        scheduler = self.lr_schedulers()
        if scheduler is not None:
            self.optimizer_factory.step(scheduler)

    def _skip_step(self, report: BackwardReport) -> None:
        """Count a step that is not made; give up after too many in a row."""
        self.num_skipped_steps += 1
        scaler = gradient_scaler(self.trainer)
        if scaler is not None:
            back_off(scaler, self.optimizers(use_pl_optimizer=False))  # type: ignore[arg-type]
            if scaler.get_scale() >= 1:
                return  # an overflow, as far as anybody knows: the next step has a smaller scale
        self.num_skipped_in_a_row += 1
        if self.num_skipped_in_a_row >= self.optimization.max_skipped_steps:
            raise NonFiniteError(
                f"optimization.max_skipped_steps: found {self.num_skipped_in_a_row} steps in a row "
                f"with a NaN or an infinity; losses per task {report.task_losses.tolist()}"
            )

    def _priors(self) -> Tensor | None:
        if self.balancer is None or self.tasks.weighting == "equal":
            return None
        return self.clusters.sizes.double() / self.clusters.num_timesteps

    def _keep_fixed_weights(self, checkpoint: dict[str, Any]) -> None:
        """Make the weights of `LinearScalarization` in the settings override the stored ones."""
        name = "balancer.weights"
        stored = (checkpoint.get("state_dict") or {}).get(name)
        if not isinstance(self.balancer, LinearScalarization) or stored is None:
            return
        checkpoint["state_dict"][name] = self.balancer.weights.clone()
        then, now = stored.tolist(), self.balancer.weights.tolist()
        if then != now and self.trainer.is_global_zero:
            say_changed({"model.tasks.balancer.weights": (then, now)})


def _use_old_keys(checkpoint: dict[str, Any]) -> None:
    """Rename the states of `Checkpoints` of version 0.1, which has the saving intervals in them."""
    states = checkpoint.get("callbacks") or {}
    for key in list(states):
        old = re.match(r"(Checkpoints\{'monitor': .*?, 'mode': '\w+'), ", key)
        if old:
            states[old.group(1) + "}"] = states.pop(key)


def _planned_steps(trainer: L.Trainer) -> float | None:
    """Optimizer steps after which a run ends; infinity without a limit, `None` if unknown.

    `Trainer.estimated_stepping_batches` would set up the loader before a checkpoint restores its
    position.
    """
    by_steps = float("inf") if trainer.max_steps in (-1, None) else trainer.max_steps
    epochs, limit = trainer.max_epochs, trainer.limit_train_batches
    if epochs in (-1, None):
        return by_steps
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "train_images"):  # loaders, or the user's own data module
        return None
    batches = len(data.train_images) // data.batch_size
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return min(by_steps, epochs * batches)
