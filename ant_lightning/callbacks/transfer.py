"""How a gradient step on one task changes the loss of every other, during training."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import lightning as L
import torch

from ant_lightning.analysis import transfer_matrix
from ant_lightning.callbacks.ema import averaged_weights
from ant_lightning.callbacks.figures import save_figure
from ant_lightning.callbacks.probe import LossProbe
from ant_lightning.errors import ConfigError
from ant_lightning.plotting import transfer_heat_map

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.modules import MultiTaskDiffusion

__all__ = ["TransferMatrix"]


class TransferMatrix(L.Callback):
    """Draws, at the end of a validation, the share of task j's loss that a step on task i takes.

    It is measured at the EMA weights by making the step and undoing it: see `transfer_matrix`.
    `k (k + 2)` passes over `num_images` images; every rank makes them all.

    Args:
        lr: Length of the plain gradient step that is tried.
        num_images: Images of each task's loss.
        batch_size: Most images in one forward pass.
        images: Whose loss: of images that are trained on (`train`) or `held_out`.
        every_n_epochs: Validations of `fit` between two measurements.

    Raises:
        ConfigError: If a number is out of range.

    Reference:
        Fifty et al., "Efficiently Identifying Task Groupings for Multi-Task Learning",
        arXiv 2109.04617.
    """

    def __init__(
        self,
        *,
        lr: float = 1e-2,
        num_images: int = 512,
        batch_size: int = 512,
        images: str = "held_out",
        every_n_epochs: int = 1,
    ) -> None:
        if not lr > 0 or min(batch_size, every_n_epochs) < 1 or num_images < 2:
            raise ConfigError(
                "TransferMatrix: lr must be above 0, batch_size and every_n_epochs at least 1 and "
                f"num_images at least 2, found {lr}, {batch_size}, {every_n_epochs} and "
                f"{num_images}"
            )
        if images not in {"train", "held_out"}:
            raise ConfigError(f"TransferMatrix.images: must be train or held_out, found {images!r}")
        self.lr = lr
        self.num_images = num_images
        self.batch_size = batch_size
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.matrix: Tensor | None = None

    def on_validation_epoch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion
    ) -> None:
        """Measure, unless this is the sanity check or not yet due."""
        fitting = trainer.state.fn == "fit"
        due = not fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.sanity_checking or not due:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        probe = LossProbe(
            pl_module,
            data.train_images if self.images == "train" else data.held_out_images,
            num_images=self.num_images,
            batch_size=self.batch_size,
            seed=pl_module.seed,
        )
        with averaged_weights(trainer, pl_module):
            self.matrix = transfer_matrix(
                probe.of_task,
                parameters=pl_module.backbone.parameters(),
                lr=self.lr,
                num_tasks=pl_module.num_tasks,
            )
        harmful = (self.matrix < 0) & ~torch.eye(len(self.matrix), dtype=torch.bool)
        pl_module.log("transfer/harmful_pairs", float(harmful.sum()), rank_zero_only=True)
        if not trainer.is_global_zero:
            return
        step = max(trainer.global_step, pl_module.trained_steps)
        title = f"share of task j's loss that one step on task i removes (lr {self.lr:g})"
        figure = transfer_heat_map(
            self.matrix.numpy(),
            labels=[f"{a}-{b - 1}" for a, b in pairwise(pl_module.clusters.boundaries)],
            title=f"{title}\nat training step {step}",
        )
        save_figure(
            trainer,
            figure,
            tag="6_transfer/lookahead",
            explain="Red: a step on task i lowers task j's loss by so much. Blue: raises it.",
        )
