"""The base of callbacks that measure a module's loss or its gradients."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

from ant_lightning.callbacks.base import RunCallback, callback_of
from ant_lightning.callbacks.ema import EMA, averaged_weights
from ant_lightning.callbacks.fixed_loss import FixedLoss
from ant_lightning.data.module import needed_image_data
from ant_lightning.errors import ConfigError, check_at_least
from ant_lightning.runtime.sharded_backbone import refuse_shards

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning as L

    from ant_lightning.models.module import MultiTaskDiffusion


class MeasuringCallback(RunCallback):
    """Base of callbacks that measure a module's loss, or its gradients, on fixed draws.

    Args:
        num_images: Images of one value, at least 2.
        batch_size: Most images in one forward pass.
        images: Images to measure on: those that are trained on (`train`), or `held_out`.
        weights: Weights to measure: `ema` or `live`.
        seed: Seed of images and noise; by default that of the module.
        every_n_epochs: Validations of `fit` between two measurements.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    def __init__(
        self,
        *,
        num_images: int,
        batch_size: int,
        images: Literal["train", "held_out"],
        weights: Literal["ema", "live"],
        seed: int | None,
        every_n_epochs: int = 1,
    ) -> None:
        check_at_least(2, num_images=num_images)
        check_at_least(1, batch_size=batch_size, every_n_epochs=every_n_epochs)
        if images not in ("train", "held_out"):
            raise ConfigError(f"images: must be train or held_out, found {images}")
        if weights not in ("ema", "live"):
            raise ConfigError(f"weights: must be ema or live, found {weights}")
        super().__init__()
        self.num_images = num_images
        self.batch_size = batch_size
        self.images = images
        self.weights = weights
        self.seed = seed
        self.every_n_epochs = every_n_epochs

    def setup(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, stage: str) -> None:
        """Refuse sharded weights, which `autograd.grad` does not see."""
        super().setup(trainer, pl_module, stage)
        refuse_shards(trainer, self)

    def is_due(self, trainer: L.Trainer) -> bool:
        """Whether the validation that ends now is one to measure at."""
        fitting = trainer.state.fn == "fit"
        due = not fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return due and not trainer.sanity_checking

    def seed_of(self, pl_module: MultiTaskDiffusion) -> int:
        """Seed of images and noise."""
        return pl_module.seed if self.seed is None else self.seed

    @contextmanager
    def fixed_loss(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> Iterator[FixedLoss]:
        """Inside, the backbone is in evaluation mode and has the weights to measure.

        Yields:
            The loss on the draws that the callback's settings determine.
        """
        data = needed_image_data(trainer, type(self).__name__)
        loss = FixedLoss(
            pl_module,
            data.train_images if self.images == "train" else data.held_out_images,
            num_images=self.num_images,
            batch_size=self.batch_size,
            seed=self.seed_of(pl_module),
        )
        # Between training steps the backbone has the live weights, during a validation the
        # averages: one of the two has to be swapped in.
        ema = callback_of(trainer, EMA)
        live = nullcontext() if ema is None else ema.live(pl_module)
        training = pl_module.backbone.training
        with averaged_weights(trainer, pl_module) if self.weights == "ema" else live:
            pl_module.backbone.eval()
            try:
                yield loss
            finally:
                pl_module.backbone.train(training)
