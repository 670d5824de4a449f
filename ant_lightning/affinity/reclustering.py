"""`Reclustering`: clusters that follow the gradients while a model trains."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from ant_lightning.affinity.clustering import GradientClustering, spread_affinity
from ant_lightning.affinity.gradient import NonFiniteGradientError
from ant_lightning.affinity.measure import task_affinity, timestep_grid
from ant_lightning.callbacks.figures import save_figure
from ant_lightning.callbacks.measuring import MeasuringCallback
from ant_lightning.errors import ConfigError, check_at_least
from ant_lightning.tasks.clusters import TimestepClusters
from ant_lightning.tasks.figure import boundaries_figure
from ant_lightning.tasks.time_axis import TimeAxis

if TYPE_CHECKING:
    import lightning as L

    from ant_lightning.models.module import MultiTaskDiffusion

_log = logging.getLogger(__name__)


class Reclustering(MeasuringCallback):
    """Measures task affinity at regular steps and replaces the clusters by the ones it finds.

    The new clusters are `GradientClustering` of the plain affinity, with as many tasks as before:
    task i keeps its weight and its part of the balancer's state. Timesteps count by how often
    training draws them if they do in the clustering that the run starts with (`weighted`), of
    whatever kind it is. All measurements use the same
    images and noise, so clusters change only with the weights. Ranks share the work and agree on
    the clusters. Boundaries are logged as `clusters/boundary_1` .. `clusters/boundary_{k-1}` and
    drawn over time. They are kept in the checkpoint, so a resumed run equals one that was never
    stopped, and an evaluation reports the losses of the checkpoint's clusters. If a gradient is
    not finite, a warning names its timestep and the clusters stay.

    Args:
        recluster_every: Optimizer steps between two measurements. Each computes the gradients of
            `num_points * num_images` images.
        num_points: Timesteps of the measured grid, evenly spread.
        num_images: Images for each timestep, in two disjoint halves.
        batch_size: Most images in one forward pass.
        images: Images to measure on: those that are trained on (`train`), or `held_out`.
        weights: Weights to measure: `live` (those that are trained) or `ema`.
        seed: Seed of images and noise; by default that of the module.

    Raises:
        ConfigError: If a number is out of its range.

    Examples:
        >>> from ant_lightning import Reclustering
        >>> Reclustering(recluster_every=1000, num_points=20).recluster_every
        1000
    """

    def __init__(
        self,
        *,
        recluster_every: int,
        num_points: int = 50,
        num_images: int = 128,
        batch_size: int = 128,
        images: Literal["train", "held_out"] = "train",
        weights: Literal["ema", "live"] = "live",
        seed: int | None = None,
    ) -> None:
        super().__init__(
            num_images=num_images, batch_size=batch_size, images=images, weights=weights, seed=seed
        )
        check_at_least(1, recluster_every=recluster_every)
        check_at_least(2, num_points=num_points)
        self.recluster_every = recluster_every
        self.num_points = num_points

    def on_fit_start(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Log the clusters that the run starts with."""
        # Timesteps with the same nearest grid point have equal affinities: n points tell apart n
        # clusters at most.
        if min(self.num_points, pl_module.process.num_timesteps) < pl_module.num_tasks:
            raise ConfigError(
                f"num_points: must be at least the number of tasks {pl_module.num_tasks}, "
                f"found {self.num_points}"
            )
        pl_module.log_now(_boundaries(pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, *args: Any, **kwargs: Any
    ) -> None:
        """Measure and recluster if it is due; a skipped step does not count."""
        # A skipped step leaves `global_step` and the weights as they are: do not measure twice.
        step = trainer.global_step
        if step % self.recluster_every or pl_module.last_step_skipped:
            return
        try:
            clusters = self._clusters(trainer, pl_module)
        except NonFiniteGradientError as error:
            _log.warning("clusters stay as they are at step %d: %s", step, error)
            return
        pl_module.recluster(clusters)
        pl_module.log_now(_boundaries(pl_module))
        if trainer.is_global_zero:
            process = pl_module.process
            figure = boundaries_figure(
                pl_module.cluster_history,
                process.log_snr,
                last_step=step + self.recluster_every,
                time=TimeAxis.of(process),
            )
            explain = "Bands that settle: the tasks are stable. Bands that jump: too few images."
            save_figure(trainer, figure, tag="5_affinity/clusters", explain=explain)

    def _clusters(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> TimestepClusters:
        """The clusters that the current weights give, the same on every rank."""
        log_snr = pl_module.process.log_snr
        with self.fixed_loss(trainer, pl_module) as loss:
            result = task_affinity(
                loss.at_timestep,
                parameters=pl_module.backbone.parameters(),
                num_timesteps=len(log_snr),
                timesteps=timestep_grid(len(log_snr), num_points=self.num_points),
                seed=self.seed_of(pl_module),
                warn_below=-1,
            )
        affinity = spread_affinity(
            result.plain, timesteps=result.timesteps, num_timesteps=len(log_snr)
        )
        clustering = GradientClustering(
            affinity, pl_module.num_tasks, weighted=pl_module.tasks.clustering.weighted
        )
        clusters = clustering.with_density(pl_module.process.density)(log_snr)
        # Ranks on different processors could round a tie differently and get other clusters.
        return trainer.strategy.broadcast(clusters)


def _boundaries(pl_module: MultiTaskDiffusion) -> dict[str, float]:
    inner = pl_module.clusters.boundaries[1:-1]
    return {f"clusters/boundary_{i}": float(value) for i, value in enumerate(inner, start=1)}
