"""Clusters that follow the gradients while a model trains."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from ant_lightning.affinity.estimate import task_affinity
from ant_lightning.affinity.grid import timestep_grid
from ant_lightning.affinity.halves import NonFiniteGradientError
from ant_lightning.affinity.probing import ProbingCallback
from ant_lightning.callbacks.figures import save_figure
from ant_lightning.errors import ConfigError
from ant_lightning.tasks.affinity_file import spread_affinity
from ant_lightning.tasks.clusterings import GradientClustering
from ant_lightning.tasks.clusters import TimestepClusters
from ant_lightning.tasks.figure import boundaries_figure

if TYPE_CHECKING:
    import lightning as L

    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["Reclustering"]

_log = logging.getLogger(__name__)


class Reclustering(ProbingCallback):
    """Measures task affinity every so many steps and makes the clusters anew from it.

    `GradientClustering` of the plain affinity, with as many tasks as before: the balancer keeps its
    k, its weights and its state, by the number of the task. Images and noise of the probe are the
    same every time, so that clusters change because the weights do. The ranks share the work and
    get the same clusters. Boundaries are logged as `clusters/boundary_1` .. `boundary_k-1`, drawn
    over time, and kept in the checkpoint: a resumed run goes on as if it had not been stopped, and
    an evaluation reports the losses of the clusters that the checkpoint was trained with. Gradients
    that are not finite are named in a warning, and the clusters stay as they are.

    Args:
        recluster_every: Optimizer steps between two measurements. Each makes the gradients of
            `num_points * num_images` images.
        num_points: Timesteps of the grid that is measured, evenly spread.
        num_images: Images for each timestep, in two disjoint halves.
        batch_size: Most images in one forward pass.
        images: From which images: those that are trained on (`train`) or `held_out`.
        weights: Of which weights: those that are trained (`live`), or `ema`.
        seed: Of images and noise; by default that of the module.

    Raises:
        ConfigError: If a number is out of range.
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
        if recluster_every < 1 or num_points < 2:
            raise ConfigError(
                "Reclustering: recluster_every must be at least 1 and num_points at least 2, found "
                f"{recluster_every} and {num_points}"
            )
        self.recluster_every = recluster_every
        self.num_points = num_points

    def on_fit_start(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Log what the run starts with."""
        if min(self.num_points, pl_module.process.num_timesteps) < pl_module.num_tasks:
            raise ConfigError(
                f"Reclustering.num_points: {pl_module.num_tasks} tasks need as many timesteps, "
                f"found {self.num_points}"
            )
        pl_module.log_now(_boundaries(pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, *args: Any, **kwargs: Any
    ) -> None:
        """Measure and recluster when it is due; a skipped step is not counted."""
        step = trainer.global_step
        if step % self.recluster_every or pl_module.last_step_skipped:
            return
        clusters = self._clusters(trainer, pl_module)
        if clusters is None:
            return
        pl_module.recluster(clusters)
        pl_module.log_now(_boundaries(pl_module))
        if trainer.is_global_zero:
            history = pl_module.cluster_history
            save_figure(
                trainer,
                boundaries_figure(
                    history, pl_module.process.log_snr, last_step=step + self.recluster_every
                ),
                tag="5_affinity/clusters",
                explain="Bands that settle: the tasks are stable. Bands that jump: too few images.",
            )

    def _clusters(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion
    ) -> TimestepClusters | None:
        """The clusters at these weights, the same on every rank."""
        log_snr = pl_module.process.log_snr
        try:
            with self.probing(trainer, pl_module) as probe:
                result = task_affinity(
                    probe.at_timestep,
                    parameters=pl_module.backbone.parameters(),
                    num_timesteps=len(log_snr),
                    timesteps=timestep_grid(len(log_snr), num_points=self.num_points),
                    log_snr=log_snr,
                    seed=self.seed_of(pl_module),
                    warn_below=-1,
                )
        except NonFiniteGradientError as error:
            _log.warning("clusters stay as they are at step %d: %s", trainer.global_step, error)
            return None
        affinity = spread_affinity(
            result.plain, timesteps=result.timesteps, num_timesteps=len(log_snr)
        )
        clusters = GradientClustering(affinity, pl_module.num_tasks)(log_snr)
        # Ranks of different processors could round a tie differently.
        return trainer.strategy.broadcast(clusters)


def _boundaries(pl_module: MultiTaskDiffusion) -> dict[str, float]:
    inner = pl_module.clusters.boundaries[1:-1]
    return {f"clusters/boundary_{i}": float(value) for i, value in enumerate(inner, start=1)}
