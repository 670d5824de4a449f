"""What callbacks that measure losses or gradients have in common: when, of what, on which data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

from ant_lightning.affinity.probe import LossProbe
from ant_lightning.callbacks.base import RunCallback, callback_of
from ant_lightning.callbacks.ema import EMA, averaged_weights
from ant_lightning.data.of_trainer import needed_image_data
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning as L

    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["ProbingCallback", "ValidationProbe"]


class ProbingCallback(RunCallback):
    """Measures a module's loss on images and noise that are fixed by a seed.

    Args:
        num_images: Images of one value, at least 2.
        batch_size: Most images in one forward pass.
        images: From which images: those that are trained on (`train`) or `held_out`.
        weights: Of which weights: `ema` or `live`.
        seed: Of images and noise; by default that of the module.

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
    ) -> None:
        name = type(self).__name__
        if batch_size < 1 or num_images < 2:
            raise ConfigError(
                f"{name}: batch_size must be at least 1 and num_images at least 2, found "
                f"{batch_size} and {num_images}"
            )
        for setting, value, known in (
            ("images", images, ("train", "held_out")),
            ("weights", weights, ("ema", "live")),
        ):
            if value not in known:
                raise ConfigError(f"{name}.{setting}: must be {' or '.join(known)}, found {value}")
        super().__init__()
        self.num_images = num_images
        self.batch_size = batch_size
        self.images = images
        self.weights = weights
        self.seed = seed

    def seed_of(self, pl_module: MultiTaskDiffusion) -> int:
        """The seed of this measurement."""
        return pl_module.seed if self.seed is None else self.seed

    @contextmanager
    def probing(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> Iterator[LossProbe]:
        """Inside, the backbone evaluates, with the weights that are measured."""
        data = needed_image_data(trainer, type(self).__name__)
        dataset = data.train_images if self.images == "train" else data.held_out_images
        probe = LossProbe(
            pl_module,
            dataset,
            num_images=self.num_images,
            batch_size=self.batch_size,
            seed=self.seed_of(pl_module),
        )
        training = pl_module.backbone.training
        with self._weights(trainer, pl_module):
            pl_module.backbone.eval()
            try:
                yield probe
            finally:
                pl_module.backbone.train(training)

    def _weights(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion
    ) -> AbstractContextManager[None]:
        if self.weights == "ema":
            return averaged_weights(trainer, pl_module)
        callback = callback_of(trainer, EMA)
        return nullcontext() if callback is None else callback.live(pl_module)


class ValidationProbe(ProbingCallback, ABC):
    """Measures at the end of a validation: of every `every_n_epochs`-th one in `fit`.

    Args:
        every_n_epochs: Validations of `fit` between two measurements.
        num_images: As for `ProbingCallback`, and so are the others.
        batch_size: See there.
        images: See there.
        weights: See there.
        seed: See there.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    def __init__(
        self,
        *,
        every_n_epochs: int,
        num_images: int,
        batch_size: int,
        images: Literal["train", "held_out"],
        weights: Literal["ema", "live"],
        seed: int | None,
    ) -> None:
        super().__init__(
            num_images=num_images, batch_size=batch_size, images=images, weights=weights, seed=seed
        )
        if every_n_epochs < 1:
            raise ConfigError(
                f"{type(self).__name__}.every_n_epochs: must be at least 1, found {every_n_epochs}"
            )
        self.every_n_epochs = every_n_epochs

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Measure, unless this is the sanity check or not yet due."""
        fitting = trainer.state.fn == "fit"
        due = not fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and not trainer.sanity_checking:
            self.measure(trainer, pl_module)

    @abstractmethod
    def measure(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Measure and publish."""
