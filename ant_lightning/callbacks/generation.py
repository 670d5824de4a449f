"""FID and its companions during validation and test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.distributed as dist

from ant_lightning.data.module import to_uint8
from ant_lightning.errors import ConfigError
from ant_lightning.metrics import (
    FeatureExtractor,
    Features,
    GenerationScores,
    ReferenceStatistics,
    collect_features,
    load_reference,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.data import ImageDataModule
    from ant_lightning.modules import MultiTaskDiffusion

__all__ = ["GenerationMetrics"]


class GenerationMetrics(L.Callback):
    """Draws images with the EMA weights and scores them against real ones.

    Each rank draws its share of the indices 0 .. num_images - 1; the features are gathered in the
    order of the index, so the values do not depend on the number of ranks. Logged as `val/fid`,
    `val/precision`, ... (`test/...` in a test), and appended to `generation_metrics.jsonl` in the
    log folder with all that the values depend on. Class-conditional models whose extractor
    classifies into the same classes also get `class_agreement`: the share of images whose
    predicted class is the one that was asked for.

    Args:
        extractor: What turns images into features.
        num_images: Images that are drawn. By default as many as are held out.
        batch_size: Images drawn at once.
        every_n_epochs: Validations between two measurements.
        reference: File of reference statistics; by default the held-out images are the reference.
        with_train: Whether to compare with the training images too (memorisation).
        k: Neighbour of precision and recall.
        seed: Of the images; by default that of the module.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        *,
        num_images: int | None = None,
        batch_size: int = 250,
        every_n_epochs: int = 1,
        reference: str | None = None,
        with_train: bool = True,
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
        self.extractor = extractor
        self.num_images = num_images
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.reference_path = reference
        self.with_train = with_train
        self.k = k
        self.seed = seed
        self.last_scores: dict[str, float] = {}
        self._real: tuple[ReferenceStatistics, Tensor | None] | None = None

    def on_validation_epoch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion
    ) -> None:
        """Measure, unless this is the sanity check or not yet due."""
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        fitting = trainer.state.fn == "fit"
        if not trainer.sanity_checking and (due or not fitting):
            self._measure(trainer, pl_module, prefix="val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:  # type: ignore[override]
        """Measure."""
        self._measure(trainer, pl_module, prefix="test")

    def _measure(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, *, prefix: str) -> None:
        self.extractor.to(pl_module.device)
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        reference, train = self._references(data)
        num_images = self.num_images or len(data.held_out_images)
        if num_images < trainer.world_size:
            raise ConfigError(
                f"GenerationMetrics.num_images: each of the {trainer.world_size} ranks needs an "
                f"image, found {num_images}"
            )
        generated = self._generate(trainer, pl_module, num_images)
        scorer = GenerationScores(k=self.k, seed=pl_module.seed if self.seed is None else self.seed)
        scores = scorer.score(generated, reference, train=train)
        agreement = _class_agreement(generated, pl_module.num_classes)
        if agreement is not None:
            scores["class_agreement"] = agreement
        self.last_scores = scores
        pl_module.log_dict(
            {f"{prefix}/{name}": value for name, value in scores.items()}, rank_zero_only=True
        )
        if trainer.is_global_zero:
            self._append(trainer, pl_module, scores, prefix)

    def _references(self, data: ImageDataModule) -> tuple[ReferenceStatistics, Tensor | None]:
        """Statistics of the held-out images and features of the training images, made once."""
        if self._real is None:
            if self.reference_path is not None:
                reference = load_reference(Path(self.reference_path))
                reference.check(
                    num_features=self.extractor.num_features,
                    extractor=self.extractor.name,
                    image_shape=data.image_shape,
                )
            else:
                held_out = collect_features(data.pixels(data.held_out_images), self.extractor)
                reference = ReferenceStatistics.from_features(
                    held_out.features, extractor=self.extractor.name
                )
            train = None
            if self.with_train:
                train = collect_features(data.pixels(data.train_images), self.extractor).features
            self._real = reference, train
        return self._real

    def _generate(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, num_images: int
    ) -> Features:
        """Features of the images of all ranks, in the order of their index."""
        ranks = trainer.world_size
        mine = range(trainer.global_rank, num_images, ranks)
        batches = (mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size))
        images = (to_uint8(pl_module.sample(batch, seed=self.seed)) for batch in batches)
        own = collect_features(images, self.extractor)
        if ranks == 1:
            return own
        parts: list[Features] = [own] * ranks
        dist.all_gather_object(parts, own)
        order = torch.cat(
            [torch.arange(rank, num_images, ranks) for rank in range(ranks)]
        ).argsort()
        features = torch.cat([part.features for part in parts])[order]
        if own.logits is None:
            return Features(features, None)
        return Features(features, torch.cat([part.logits for part in parts])[order])  # type: ignore[misc]

    def _append(
        self,
        trainer: L.Trainer,
        pl_module: MultiTaskDiffusion,
        scores: dict[str, float],
        prefix: str,
    ) -> None:
        """One line of JSON with the values and what they depend on."""
        row: dict[str, Any] = {
            "stage": prefix,
            "step": max(trainer.global_step, pl_module.trained_steps),
            "scores": scores,
            "sampler": str(pl_module.sampler),
            "guidance_scale": pl_module.guidance_scale,
            "seed": pl_module.seed if self.seed is None else self.seed,
            "extractor": self.extractor.name,
            "reference": self.reference_path or "held-out images",
        }
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "generation_metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def _class_agreement(generated: Features, num_classes: int) -> float | None:
    """Share of images whose predicted class is index modulo the number of classes."""
    if generated.logits is None or generated.logits.shape[1] != num_classes:
        return None
    asked = torch.arange(len(generated.logits)) % num_classes
    return float((generated.logits.argmax(1) == asked).double().mean())
