"""FID and its companions during validation and test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L

from ant_lightning.callbacks.base import RunCallback, steps_of
from ant_lightning.callbacks.classes import warn_of_empty_classes
from ant_lightning.callbacks.figures import log_folder, save_figure
from ant_lightning.data.of_trainer import needed_image_data
from ant_lightning.errors import ConfigError
from ant_lightning.generation.extractors.features import FeatureExtractor
from ant_lightning.generation.gathered import real_statistics
from ant_lightning.generation.generated import class_agreement, generated_features, num_generated
from ant_lightning.generation.reference import ReferenceStatistics, load_reference
from ant_lightning.generation.scores import GenerationScores
from ant_lightning.generation.stored_images import StoredImages
from studies.quality_figure import quality_history

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.data.module import ImageDataModule
    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["GenerationMetrics"]


class GenerationMetrics(RunCallback):
    """Draws images with the EMA weights and scores them against real ones.

    Each rank draws its share of the indices 0 .. num_images - 1; the features are gathered in the
    order of the index, so the values do not depend on the number of ranks. Logged as `val/fid`,
    `val/kid`, `val/inception_score`, `val/precision`, ... (`test/...` in a test), drawn against
    the step, and appended to `generation_metrics.jsonl` in the log folder with all that the values
    depend on. Class-conditional models whose extractor classifies into the same classes also get
    `class_agreement`: the share of images whose predicted class is the one that was asked for.

    With `StoredImages` in the place of a model, its images are scored.

    Args:
        extractor: What turns images into features.
        num_images: Images that are drawn. By default as many as are held out, or all stored ones.
        batch_size: Images drawn at once.
        every_n_epochs: Validations between two measurements.
        reference: File of reference statistics, or `train` for the training images, against which
            models of faces are usually scored; by default the held-out images are the reference.
        with_train: Whether to compare with the training images too (memorisation).
        cache_dir: Where statistics of real images are kept, each under a fingerprint of images and
            extractor; by default `reference_cache` in the folder of the logs of all runs.
        k: Neighbour of precision and recall; 0 leaves these two out.
        seed: Of the images; by default that of the module.

    Raises:
        ConfigError: If a number is out of range, or the training images are to be compared twice.
    """

    last_scores: dict[str, float]
    module_type = L.LightningModule  # also stored images
    _history: dict[int, dict[str, float]]
    of_run: ClassVar = {"last_scores": dict, "_history": dict}

    def __init__(
        self,
        extractor: FeatureExtractor,
        *,
        num_images: int | None = None,
        batch_size: int = 250,
        every_n_epochs: int = 1,
        reference: str | None = None,
        with_train: bool = True,
        cache_dir: str | None = None,
        k: int = 3,
        seed: int | None = None,
    ) -> None:
        if num_images is not None and num_images <= k:
            raise ConfigError(
                f"GenerationMetrics.num_images: must be above k = {k}, found {num_images}"
            )
        if batch_size < 1 or every_n_epochs < 1:
            raise ConfigError(
                "GenerationMetrics: batch_size and every_n_epochs must be at least 1, found "
                f"{batch_size} and {every_n_epochs}"
            )
        if reference == "train" and with_train:
            raise ConfigError(
                "GenerationMetrics.with_train: must be false where training images are the "
                "reference, found true"
            )
        super().__init__()
        self.extractor = extractor
        self.num_images = num_images
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.reference_path = reference
        self.with_train = with_train
        self.cache_dir = cache_dir
        self.k = k
        self.seed = seed
        self._real: tuple[ReferenceStatistics, Tensor | None] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reset the real images: they may differ from the last call."""
        super().setup(trainer, pl_module, stage)
        self._real = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Measure, unless this is the sanity check or not yet due."""
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        fitting = trainer.state.fn == "fit"
        if not trainer.sanity_checking and (due or not fitting):
            self._measure(trainer, pl_module, prefix="val")

    def on_test_epoch_end(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion | StoredImages
    ) -> None:
        """Measure."""
        self._measure(trainer, pl_module, prefix="test")

    def state_dict(self) -> dict[str, Any]:
        """The values so far, so that a resumed run goes on drawing them."""
        return {"history": dict(self._history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the values of a checkpoint."""
        self._history = dict(state_dict["history"])

    def _measure(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion | StoredImages, *, prefix: str
    ) -> None:
        self.extractor.to(pl_module.device)
        data = needed_image_data(trainer, "GenerationMetrics")
        generated, shape = generated_features(
            trainer,
            pl_module,
            self.extractor,
            num_images=num_generated(trainer, pl_module, self.num_images),
            batch_size=self.batch_size,
            seed=self.seed,
        )
        if self._real is None and trainer.is_global_zero:
            warn_of_empty_classes(data, pl_module.num_classes)
        reference, train = self._references(trainer, data, shape)
        scorer = GenerationScores(k=self.k, seed=pl_module.seed if self.seed is None else self.seed)
        scores = scorer.score(generated, reference, train=train)
        agreement = class_agreement(generated, pl_module.num_classes)
        if agreement is not None:
            scores["class_agreement"] = agreement
        self.last_scores = scores
        pl_module.log_dict(
            {f"{prefix}/{name}": value for name, value in scores.items()}, rank_zero_only=True
        )
        step = steps_of(trainer, pl_module)
        self._history[step] = scores
        if trainer.is_global_zero:
            self._append(trainer, pl_module, scores, prefix)
            if not isinstance(pl_module, StoredImages):
                self._draw(trainer)

    def _references(
        self, trainer: L.Trainer, data: ImageDataModule, shape: tuple[int, int, int]
    ) -> tuple[ReferenceStatistics, Tensor | None]:
        """Statistics of the held-out images and features of the training images, once a call."""
        if self._real is None:
            cache = self._cache_dir(trainer)
            if self.reference_path not in (None, "train"):
                reference = load_reference(Path(self.reference_path))
            else:
                real = data.train_images if self.reference_path else data.held_out_images
                reference = real_statistics(data, real, self.extractor, cache_dir=cache)
            train = None
            if self.with_train:
                train = real_statistics(
                    data, data.train_images, self.extractor, cache_dir=cache
                ).features
            self._real = reference, train
        self._real[0].check(
            num_features=self.extractor.num_features,
            extractor=self.extractor.name,
            image_shape=shape,
        )
        return self._real

    def _cache_dir(self, trainer: L.Trainer) -> Path | None:
        if self.cache_dir is not None:
            return Path(self.cache_dir)
        logger = trainer.logger
        logs = None if logger is None else logger.save_dir
        return None if logs is None else Path(logs) / "reference_cache"

    def _append(
        self,
        trainer: L.Trainer,
        pl_module: MultiTaskDiffusion | StoredImages,
        scores: dict[str, float],
        prefix: str,
    ) -> None:
        """One line of JSON with the values and what they depend on."""
        row: dict[str, Any] = {
            "stage": prefix,
            "scores": scores,
            "extractor": self.extractor.name,
            "reference": self.reference_path or "held-out images",
        }
        if isinstance(pl_module, StoredImages):
            row["images"] = str(pl_module.path)
        else:
            row |= {
                "step": steps_of(trainer, pl_module),
                "sampler": str(pl_module.sampler),
                "guidance_scale": pl_module.guidance_scale,
                "seed": pl_module.seed if self.seed is None else self.seed,
            }
        with (log_folder(trainer) / "generation_metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _draw(self, trainer: L.Trainer) -> None:
        steps, scores = zip(*sorted(self._history.items()), strict=True)
        save_figure(
            trainer,
            quality_history(steps, scores),
            tag="2_quality/history",
            explain="FID is good when it reaches the dashed line; much nearer to training images "
            "than held-out ones are is copying.",
        )
