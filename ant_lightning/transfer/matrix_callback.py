"""`TransferMatrix`: how a step on one task changes the losses of the others, in validation."""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ant_lightning.callbacks.base import steps_of
from ant_lightning.callbacks.figures import save_figure
from ant_lightning.callbacks.measuring import MeasuringCallback
from ant_lightning.callbacks.task_figures import task_labels, transfer_heat_map
from ant_lightning.errors import check_above
from ant_lightning.tasks.time_axis import TimeAxis
from ant_lightning.transfer.matrix import transfer_matrix

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

    from ant_lightning.models.module import MultiTaskDiffusion


class TransferMatrix(MeasuringCallback):
    """Measures the share of task j's loss that a step on task i removes, in a validation.

    It takes the step and undoes it: see `transfer_matrix`. That costs `k (k + 2)` passes over
    `num_images` images; every rank makes them all. The matrix is drawn, and the number of its
    negative entries off the diagonal is logged as `transfer/harmful_pairs`.

    Args:
        lr: Length of the gradient step that is tried.
        num_images: Images of each task's loss.
        batch_size: Most images in one forward pass.
        images: Images to measure on: those that are trained on (`train`), or `held_out`.
        weights: Weights to measure: `ema` or `live`.
        every_n_epochs: Validations of `fit` between two measurements.
        seed: Seed of images and noise; by default that of the module.

    Raises:
        ConfigError: If a number is out of its range.

    Reference:
        Fifty et al., "Efficiently Identifying Task Groupings for Multi-Task Learning",
        arXiv 2109.04617.

    Examples:
        >>> from ant_lightning import TransferMatrix
        >>> TransferMatrix(lr=0.01, num_images=128).images
        'held_out'
    """

    matrix: Tensor | None
    run_state: ClassVar = {"matrix": NoneType}

    def __init__(
        self,
        *,
        lr: float = 1e-2,
        num_images: int = 512,
        batch_size: int = 512,
        images: Literal["train", "held_out"] = "held_out",
        weights: Literal["ema", "live"] = "ema",
        every_n_epochs: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            num_images=num_images,
            batch_size=batch_size,
            images=images,
            weights=weights,
            seed=seed,
            every_n_epochs=every_n_epochs,
        )
        check_above(0, lr=lr)
        self.lr = lr

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Measure, log and draw."""
        if not self.is_due(trainer):
            return
        with self.fixed_loss(trainer, pl_module) as loss:
            self.matrix = transfer_matrix(
                loss.of_task,
                parameters=pl_module.backbone.parameters(),
                lr=self.lr / float(loss.scale),  # the gradients are `scale` times too large
                num_tasks=pl_module.num_tasks,
            )
        # Without the diagonal: a step harms its own task only if `lr` is too large.
        harmful = (self.matrix < 0) & ~torch.eye(len(self.matrix), dtype=torch.bool)
        pl_module.log("transfer/harmful_pairs", float(harmful.sum()), rank_zero_only=True)
        if not trainer.is_global_zero:
            return
        title = f"share of task j's loss that one step on task i removes (lr {self.lr:g})"
        time = TimeAxis.of(pl_module.process)
        figure = transfer_heat_map(
            self.matrix.numpy(),
            labels=task_labels(pl_module.clusters, time),
            unit=time.unit,
            title=f"{title}\nat training step {steps_of(trainer, pl_module)}",
        )
        explain = "Red: a step on task i lowers task j's loss by this share. Blue: it raises it."
        save_figure(trainer, figure, tag="6_transfer/lookahead", explain=explain)
