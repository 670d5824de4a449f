"""The LightningModule in which every diffusion model and every multi-task method trains."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ant_lightning.backbones.diffusers import as_backbone
from ant_lightning.balancing.backward import BackwardReport, task_gradients
from ant_lightning.balancing.base import SampleBalancer
from ant_lightning.balancing.reduction import default_reduction
from ant_lightning.data.latents.space import LatentSpace
from ant_lightning.diffusion.process import NoiseProcess
from ant_lightning.errors import ConfigError, check_instance
from ant_lightning.models.adapters import Adapter, insert
from ant_lightning.models.auxiliary import FeatureAlignment
from ant_lightning.models.backbone import backbone_name, check_backbone, size_of
from ant_lightning.models.checkpoint_origin import InitialWeights
from ant_lightning.models.checks import (
    check_sharding,
    check_strategy,
    check_trainer,
    check_trainer_flags,
)
from ant_lightning.models.denoiser import DiffusionModule
from ant_lightning.models.draws import Draws, TrainingDraws
from ant_lightning.models.first_stage.first_stage import FirstStage
from ant_lightning.models.old_checkpoints import upgrade
from ant_lightning.models.optimizer_step import OptimizerStep, SkippedSteps
from ant_lightning.models.optimizers import OptimizerFactory
from ant_lightning.models.resumed_settings import OptimizerSettings, keep_fixed_weights
from ant_lightning.models.running_statistics import RunningStatistics
from ant_lightning.models.settings import Optimization, Sampling, Tasks, TimestepSampling
from ant_lightning.models.settings_checks import (
    check_settings,
    warn_of_other_model,
    warn_of_other_ranks,
    warn_of_rare_tasks,
)
from ant_lightning.models.state import CheckpointState, process_summary, schedule_summary
from ant_lightning.randomness import keyed_seed
from ant_lightning.runtime.rank_agreement import check_ranks_agree

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

    from ant_lightning.balancing.gradients import DenseTaskGradients
    from ant_lightning.balancing.task_batch import Losses
    from ant_lightning.data.batch import Batch
    from ant_lightning.diffusion.condition import Condition
    from ant_lightning.tasks.clusters import TimestepClusters

# Attributes that training changes besides the weights; a child process returns them.
_OF_RUN = (
    "clusters",
    "cluster_history",
    "initial_weights",
    "latent_space",
    "trained_steps",
)


class MultiTaskDiffusion(DiffusionModule):
    """A diffusion model trained on clusters of timesteps as tasks.

    One optimization step serves every method: draw timesteps, let `MultiTaskStep` fill the
    gradients, clip, step.

    Args:
        backbone: The network, called as `backbone(x_t, t, condition)`; see the page "Your own
            model". One of diffusers is put into a `DiffusersBackbone`.
        process: How noise is added, what the network is given and what its output means:
            `DiscreteDiffusion`, `FlowMatching` or `EDM`.
        tasks: What the tasks are and how they are balanced.
        timesteps: How timesteps are drawn in training.
        optimization: How the weights are optimised.
        sampling: How images are drawn from noise.
        class_dropout: Share of images whose condition is replaced by the null class, or by the null
            value of every entry, for guidance.
        first_stage: Autoencoder whose latents are denoised; `None` for pixels.
        auxiliary: A term of the loss from inside the network; `None` for none.
        adapter: Trains an adapter of PEFT in place of the backbone's own weights, which then are in
            no checkpoint: they come from where the backbone does.
        init_from: Official checkpoint, or folder of diffusers, that the backbone starts from. For
            other classes or another size of images, class table and positions are re-initialised,
            which is printed. A checkpoint that is loaded later replaces the weights, and then the
            file need not exist any more.
        init_weights: Which weights of that file, if it has both: the averages or the live ones.
        seed: Seed of timesteps, noise and dropout; by default that of `seed_everything`.

    Raises:
        ConfigError: If settings contradict each other.
        NonFiniteError: In training, after `optimization.max_skipped_steps` skipped steps in a row.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", arXiv 2306.00354.

    Examples:
        >>> from ant_lightning import CosineSchedule, DDIM, DiscreteDiffusion, DiT
        >>> from ant_lightning import MultiTaskDiffusion, Sampling, SNRClustering, Tasks
        >>> network = DiT(
        ...     input_size=8, patch_size=4, in_channels=1, hidden_size=8, depth=1, num_heads=1,
        ...     num_classes=0, learn_sigma=False,
        ... )
        >>> module = MultiTaskDiffusion(
        ...     network,
        ...     process=DiscreteDiffusion(CosineSchedule(1000)),
        ...     tasks=Tasks(SNRClustering(num_tasks=5)),
        ...     sampling=Sampling(DDIM(num_steps=2)),
        ... )
        >>> module.clusters.boundaries
        (0, 133, 372, 653, 881, 1000)
        >>> module.sample(3).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        process: NoiseProcess,
        tasks: Tasks,
        timesteps: TimestepSampling = TimestepSampling(),
        optimization: Optimization = Optimization(),
        sampling: Sampling = Sampling(),
        class_dropout: float = 0.0,
        first_stage: FirstStage | None = None,
        auxiliary: FeatureAlignment | None = None,
        adapter: Adapter | None = None,
        init_from: str | None = None,
        init_weights: Literal["ema", "model"] = "ema",
        seed: int | None = None,
    ) -> None:
        backbone = as_backbone(backbone)
        check_backbone(backbone)
        check_instance(NoiseProcess, "DiscreteDiffusion() or FlowMatching()", process=process)
        check_instance(Tasks, "Tasks(SNRClustering(num_tasks=5))", tasks=tasks)
        super().__init__(
            backbone,
            process=process,
            clusters=tasks.clusters(process, size_of(backbone)),
            sampling=sampling,
            first_stage=first_stage,
            seed=seed,
        )
        self.automatic_optimization = False  # `MultiTaskStep` replaces `loss.backward()`
        self.tasks = tasks
        self.balancer = tasks.balancer
        specialist = timesteps.interval is not None
        # Vanilla training draws timesteps as DDPM does; for a balancer each task has its share.
        # A part of the module, so that a checkpoint has its state.
        self.proposal = timesteps.proposal
        plain = tasks.balancer is None or specialist or self.proposal is not None
        by_default = "uniform" if plain else "stratified"
        method: Any = timesteps.method or by_default
        self.timesteps = replace(timesteps, method=method)
        self.optimization = optimization
        self.class_dropout = class_dropout
        self.auxiliary = auxiliary
        self.init_from = init_from
        self.initial_weights = InitialWeights(init_from, init_weights)
        self.first_clusters = self.clusters  # those of the settings; `recluster` changes the others
        # Pairs (optimizer steps made before, boundaries).
        self.cluster_history = [(0, self.clusters.boundaries)]
        self.last_report: BackwardReport | None = None
        # Tasks and importance of its images, [b] each; see `Draws`.
        self.last_draws: tuple[Tensor, Tensor | None] | None = None
        check_settings(
            tasks, self.timesteps, optimization, clusters=self.clusters, backbone=backbone
        )
        if not 0 <= class_dropout < 1:
            raise ConfigError(
                f"class_dropout: must be at least 0 and below 1, found {class_dropout}"
            )
        self.conditions.check_null("class_dropout", class_dropout, neutral=0)
        warn_of_other_model(tasks.clustering, backbone)
        if auxiliary is not None:
            auxiliary.path = "auxiliary."
            auxiliary.attach(backbone)
        self._step = OptimizerStep(
            backbone, tasks, optimization, auxiliary=auxiliary, num_tasks=self.num_tasks
        )
        self.draws = TrainingDraws(
            process=self.process,
            timesteps=self.timesteps,
            placement=tasks.placement,
            class_dropout=class_dropout,
            conditions=self.conditions,
            image_shape=self.image_shape,
            seed=self.seed,
        )
        self._warned_of_rare_tasks = False
        if init_from is not None and Path(init_from).exists():
            self.load_initial_weights()
        self.adapter = adapter
        if adapter is not None:
            self._insert(adapter)

    @property
    def optimizer_factory(self) -> OptimizerFactory:
        """Makes the optimizer and the scheduler."""
        return self._step.factory

    @property
    def num_skipped_steps(self) -> int:
        """Steps of the run that were skipped because of a NaN or an infinity."""
        return self._step.skipped.num_steps

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last step was one of these."""
        return self._step.skipped.last

    def load_initial_weights(self) -> None:
        """Fill the backbone from `init_from`, once, unless a checkpoint was loaded.

        This happens when the module is constructed or, if the file is missing then, when the
        weights are needed.

        Raises:
            ConfigError: If the file does not fit, or is of another process.
        """
        self.initial_weights.load(self.process, self.backbone)

    def _insert(self, adapter: Adapter) -> None:
        """Put the adapter in; from now on the state of the module is that of the adapter."""
        if self.initial_weights.due:
            raise ConfigError(
                f"init_from: must be a file with an adapter, whose base it is, found "
                f"{self.init_from}"
            )
        self.leave_out(insert(adapter, self.backbone))

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own loose type
        """Optimizer of the backbone, of the balancer and of the auxiliary term."""
        self.load_initial_weights()
        optimizer, scheduler = self._step.optimizer(self.backbone, self._trainer)
        return optimizer if scheduler is None else ([optimizer], [scheduler])

    def denoise(
        self,
        x_t: Tensor,
        times: Tensor,
        condition: Condition,
        *,
        network: nn.Module | None = None,
    ) -> Tensor:
        """As in the base class, but load `init_from` first if that is still due."""
        self.load_initial_weights()
        return super().denoise(x_t, times, condition, network=network)

    def configure_model(self) -> None:
        """Shard the backbone if the strategy is `ShardedStrategy`."""
        if self._trainer is not None:
            check_sharding(self.trainer.strategy, self.tasks)
        super().configure_model()

    def setup(self, stage: str) -> None:
        """Refuse, before anything is wrapped or moved, a strategy or data that do not fit."""
        if stage == "fit":
            check_strategy(self.trainer.strategy)
            # A new run of a module that may have been trained before: counts start at 0, the
            # clusters stay. (Loading a checkpoint comes later and replaces all of these.)
            if self.global_step == 0:
                # Stays the first entry: `check_fits` compares it with the settings on a resume.
                first = self.cluster_history[0]
                now = (0, self.clusters.boundaries)
                self.cluster_history = [first] if now == first else [first, now]
                self._step.skipped = SkippedSteps()
        super().setup(stage)

    def configure_callbacks(self) -> list[L.Callback]:
        """Callbacks of every run; the first hook that has the trainer, so it checks its flags.

        Raises:
            ConfigError: For a flag that manual optimization cannot honour.
        """
        if self.is_training_run:
            check_trainer_flags(self.trainer)
        return super().configure_callbacks()

    def on_fit_start(self) -> None:
        """Refuse, before the first step, what manual optimization cannot honour."""
        check_trainer(
            self.trainer,
            backbone=self.backbone,
            balancer=self.balancer,
            parts=self.optimization.accumulate_grad_batches,
        )
        self._step.begin(self.backbone)

    def draw(self, batch: Batch, *, step: int) -> Draws:
        """Timesteps, tasks, noise and labels of this rank in a training step."""
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return self.draws(batch, self.clusters, step=step, rank=rank, world_size=world_size)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """One step of any method.

        Raises:
            ConfigError: If the loader does not give a `Batch` that fits the backbone.
        """
        self.check_images(batch)
        # Dropout inside the network: other masks on each rank, the same ones in a resumed run.
        torch.manual_seed(keyed_seed(self.seed, "network", self.global_step, self.global_rank))
        draws = self.draw(batch, step=self.global_step)
        if not self._warned_of_rare_tasks and self.balancer is not None:
            self._warned_of_rare_tasks = True
            stratified = self.timesteps.method == "stratified"
            allocation = self.timesteps.allocation if stratified else None
            total = len(batch.images) * self.trainer.world_size
            density = self.draws.training_density
            warn_of_rare_tasks(self.clusters.masses(density), total, allocation)
        log_snr = priors = None
        if isinstance(self.balancer, SampleBalancer):
            log_snr = self.process.log_snr_at(draws.times)
        if self.balancer is not None and self.tasks.weighting == "by_size":
            # pi_i is the mass of the cluster: |I_i| / T under the uniform density.
            priors = self.clusters.masses(self.draws.density)
        x_start = self.encode(batch, step=self.global_step)
        losses: Losses = self.losses(x_start, draws)
        if self.auxiliary is not None:
            losses = self._with_auxiliary(self.auxiliary, losses, batch, draws)
        report = self._step.make(
            losses,
            draws.tasks,
            trainer=self.trainer,
            optimizer=self.optimizers(),
            scheduler=self.lr_schedulers(),
            priors=priors,
            log_snr=log_snr,
        )
        self.last_report, self.last_draws = report, (draws.tasks, draws.importance)
        # Log the mean over the process' own density, however the batch was allocated and the
        # balancer weights it: methods stay comparable.
        assert report.aux is not None, "`losses` gives the mean squared errors beside the losses"
        loss = self.draws.mean_loss(
            report.aux,
            draws,
            self.clusters,
            num_samples=report.num_samples,
            world_size=self.trainer.world_size,
        )
        gather = self.all_gather if self.trainer.world_size > 1 else None
        self.draws.record(draws, report.aux, gather=gather)
        if self.log_due:
            loss = default_reduction().all_reduce_(loss.detach()) / self.trainer.world_size
            # For progress bar and monitors; `log_now` sends it to the loggers at the right step.
            self.log("train/loss", loss, prog_bar=True, logger=False)
            self.log_now(
                {
                    "train/loss": loss,
                    "train/objective": report.objective,
                    "train/grad_norm": report.grad_norm,
                    "train/skipped_steps": self.num_skipped_steps,
                }
            )
            if self.auxiliary is not None and self.auxiliary.value is not None:
                self.log_now({"train/alignment": self.auxiliary.value})
        return {"loss": loss}

    def _with_auxiliary(
        self,
        auxiliary: FeatureAlignment,
        losses: Losses,
        batch: Batch,
        draws: Draws,
    ) -> Losses:
        """The losses with the auxiliary term.

        Raises:
            ConfigError: If the batch has no images, or the term does not fit.
        """
        images = self.images_of(batch)  # decodes cached latents
        if self.first_stage is None and self.latent_space is not None:
            raise ConfigError(
                "auxiliary.features: need images, or a first_stage that decodes the cached "
                f"latents, found latents {list(images.shape[1:])} and no first_stage"
            )
        return auxiliary.added(losses, images, factors=draws.correction)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Update `trained_steps`."""
        self.trained_steps = self.global_step

    def task_gradients(self, batch: Batch, *, step: int) -> DenseTaskGradients:
        """Task gradients at the current weights, for the draws of `step`; changes no state."""
        draws = self.draw(batch, step=step)
        statistics = RunningStatistics(self.backbone)
        losses = statistics.once(self.losses(self.encode(batch, step=step), draws))
        shared = self.backbone.parameters()
        found = task_gradients(losses, draws.tasks, shared, num_tasks=self.num_tasks)
        statistics.restore()
        return found

    def recluster(self, clusters: TimestepClusters) -> None:
        """Continue with other clusters; task i keeps its index, balancer weight and log keys.

        Every rank must pass the same clusters.

        Raises:
            ConfigError: If the number of tasks or of timesteps would change.
        """
        for name in ("num_tasks", "num_timesteps"):
            now, then = getattr(clusters, name), getattr(self.clusters, name)
            if now != then:
                raise ConfigError(f"clusters: {name} must stay {then}, found {now}")
        self.clusters = clusters
        self.cluster_history.append((self.global_step, clusters.boundaries))

    def checkpoint_state(self) -> CheckpointState:
        """What a checkpoint of this module holds besides weights."""
        optimizer = optimization = None
        if self.is_training_run:
            # A checkpoint may be loaded before the trainer has its optimizer.
            made, factory = self.trainer.optimizers, self.optimizer_factory
            optimizer = type(made[0]).__name__ if made else factory.kind()
            optimization = OptimizerSettings(factory).described()
        space, interval = self.latent_space, self.timesteps.interval
        return CheckpointState(
            cluster_history=self.cluster_history,
            num_skipped_steps=self.num_skipped_steps,
            num_skipped_in_a_row=self._step.skipped.num_in_a_row,
            world_size=0 if self._trainer is None else self.trainer.world_size,
            backbone=backbone_name(self.backbone),
            prediction_type=self.process.prediction_type,
            process=process_summary(self.process),
            variance_type=self.process.identity().get("variance_type"),
            schedule=schedule_summary(self.process),
            balancer=None if self.balancer is None else type(self.balancer).__name__,
            optimizer=optimizer,
            # Empty for latents of other programs, whose first stage is not known.
            first_stage=None if space is None else space.fingerprint or None,
            train_interval=None if interval is None else list(interval),
            latent_space=None if space is None else asdict(space),
            optimization=optimization,
            trained=self._step.trained.state(self.backbone),
            adapter=None if self.adapter is None else str(self.adapter),
            base_weights=self.base_weights,
            arrival_orders=self._step.arrival_orders(),
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store clusters, counts, and the settings that a resumed run is compared with.

        Raises:
            DivergedRanksError: On every rank, if they no longer agree.
        """
        counts = [self.global_step, self.num_skipped_steps, *self.clusters.boundaries]
        # First: ranks that have diverged must not leave a checkpoint.
        check_ranks_agree(self.backbone, self.balancer, counts, device=self.device)
        checkpoint.setdefault("ant_lightning", {}).update(self.checkpoint_state().state_dict())
        checkpoint["null_condition"] = self.conditions.null_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the checkpoint with the settings; take its clusters and counts.

        The settings give the clusters that a run starts with. If training changed them
        (`recluster`), the run continues with the last clusters of the checkpoint, whatever its
        callbacks are.

        Raises:
            ConfigError: Naming what differs, with both values.
        """
        self.use_own_names(checkpoint)
        upgrade(checkpoint)
        state = CheckpointState.of_checkpoint(checkpoint)
        state.check_fits(self.checkpoint_state())
        self.check_weights(checkpoint)
        self.cluster_history = state.cluster_history
        # A checkpoint stores boundaries only. Those of `ShuffledClusters`, the placebo, say nothing
        # about its permutation, so unchanged clusters are taken from the settings.
        unchanged = self.first_clusters.boundaries == state.clusters.boundaries
        self.clusters = self.first_clusters if unchanged else state.clusters
        self._step.skipped = SkippedSteps(state.num_skipped_steps, state.num_skipped_in_a_row)
        self.trained_steps = int(checkpoint["global_step"])
        own = None if self.first_stage is None else self.first_stage.space
        if state.latent_space is not None and self.latent_space in (None, own):
            # Without it, latents would be treated as pixels and clipped during sampling, and those
            # of another program would be decoded with the first stage's own scale.
            self.latent_space = LatentSpace(**state.latent_space)
        self.conditions.take_null(checkpoint.get("null_condition", {}))
        self.initial_weights.due = False
        if self.is_training_run:
            warn_of_other_ranks(
                state.world_size,
                self.trainer.world_size,
                placement=self.tasks.placement,
                backbone=self.backbone,
            )
            keep_fixed_weights(self.balancer, checkpoint, trainer=self.trainer)
            OptimizerSettings(self.optimizer_factory).resume(
                self.trainer, checkpoint, state.optimization
            )
            self._step.trained.load(state.trained)
            self._step.load_arrival_orders(state.arrival_orders or {})

    def child_state(self, trainer: L.Trainer) -> dict[str, Any]:
        """In a child process: the state that training changed besides the weights."""
        fitted = trainer.state.fn == "fit"  # otherwise the parent's weights are unchanged
        state = {name: getattr(self, name) for name in _OF_RUN}
        return {**state, "skipped": self._step.skipped} if fitted else {}

    def load_child_state(self, state: dict[str, Any], pl_module: L.LightningModule) -> None:
        """In the parent: take over the state that training in the child changed."""
        self._step.skipped = state.pop("skipped", self._step.skipped)
        vars(self).update(state)
