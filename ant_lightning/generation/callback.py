"""`GenerationMetrics`: FID and other scores of generated images in validation and test."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from ant_lightning.callbacks.base import RunCallback, steps_of
from ant_lightning.callbacks.classes import warn_of_empty_classes
from ant_lightning.callbacks.figures import append_row, save_figure
from ant_lightning.callbacks.progress import progress_of, showing_steps
from ant_lightning.data.batch import to_uint8
from ant_lightning.data.module import needed_image_data
from ant_lightning.errors import ConfigError, check_at_least, found_at
from ant_lightning.generation.extractor import FeatureExtractor, ModuleFeatures
from ant_lightning.generation.figure import quality_history
from ant_lightning.generation.inception import InceptionFeatures
from ant_lightning.generation.inception_file import without_weights
from ant_lightning.generation.neighbours import NUM_NEIGHBOURS
from ant_lightning.generation.reference import real_statistics
from ant_lightning.generation.scores import GenerationScores
from ant_lightning.generation.statistics import ImageStatistics
from ant_lightning.runtime.progress_display import ProgressDisplay

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning as L

    from ant_lightning.data.dataset import ImageDataset
    from ant_lightning.data.module import ImageDataModule
    from ant_lightning.models.module import MultiTaskDiffusion


class GenerationMetrics(RunCallback):
    """Draws images with the EMA weights and scores them against real ones.

    Each rank draws its share of the indices 0 .. num_images - 1, and the scores do not depend on
    the number of ranks. They are logged as `val/fid`, `val/kid`, `val/inception_score`,
    `val/precision`, ... (`test/...` in a test) and plotted against the step. A row of
    `generation_metrics.jsonl` in the log folder has them together with all settings that they
    depend on. If the model is class-conditional and the extractor classifies into the same
    classes, there is also `class_agreement`: the share of images whose predicted class is the one
    that was asked for.

    `ant-lightning score` scores stored images with the same settings.

    Args:
        extractor: Network that turns images into features; by default `InceptionFeatures()`. If
            its weights are not there and cannot be downloaded, a run goes on without scores and
            says so.
        num_images: Images to draw; by default as many as are held out. `ant-lightning score` by
            default scores all stored images.
        batch_size: Images drawn at once.
        every_n_epochs: Validations between two measurements.
        reference: File of `ImageStatistics`, or `train` for the training images, against which
            models of faces are usually scored; by default the held-out images are the reference.
        with_train: Whether to compare with the training images too (memorisation).
        cache_dir: Folder that keeps statistics of real images, each under a fingerprint of images
            and extractor; by default `reference_cache` in the logger's folder of all runs.
        k: Precision and recall use the distance to the k-th nearest neighbour; 0 leaves them out.
        seed: Seed of the images; by default that of the module.

    Raises:
        ConfigError: If a number is out of range, or the training images are to be compared twice.

    Examples:
        >>> from ant_lightning import DigitsFeatures, GenerationMetrics
        >>> metrics = GenerationMetrics(DigitsFeatures(), num_images=1000)
        >>> metrics.last_scores  # after `Trainer(callbacks=[metrics]).validate(module, data)`
        {}
    """

    last_scores: dict[str, float]
    _history: dict[int, dict[str, float]]
    run_state: ClassVar = {"last_scores": dict, "_history": dict}

    def __init__(
        self,
        extractor: FeatureExtractor | None = None,
        *,
        num_images: int | None = None,
        batch_size: int = 250,
        every_n_epochs: int = 1,
        reference: str | None = None,
        with_train: bool = True,
        cache_dir: str | None = None,
        k: int = NUM_NEIGHBOURS,
        seed: int | None = None,
    ) -> None:
        # An image is not its own neighbour: the k-th nearest takes k + 1 images.
        if num_images is not None and num_images <= k:
            raise ConfigError(f"num_images: must be above k = {k}, found {num_images}")
        check_at_least(1, batch_size=batch_size, every_n_epochs=every_n_epochs)
        # Each real image would be its own nearest training image, at distance 0.
        if reference == "train" and with_train:
            raise ConfigError(
                "with_train: must be false if training images are the reference, found true"
            )
        super().__init__()
        self._extractor = extractor
        self.num_images = num_images
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.reference = reference
        self.with_train = with_train
        self.cache_dir = cache_dir
        self.k = k
        self.seed = seed
        self._scores: GenerationScores | None = None
        self._is_off = False

    @property
    def extractor(self) -> FeatureExtractor:
        """The network; the default one is loaded when it is first asked for.

        Raises:
            ConfigError: If its weights are not here and cannot be downloaded.
        """
        if self._extractor is None:
            self._extractor = InceptionFeatures()
        return self._extractor

    @property
    def scored_by(self) -> str:
        """The network to name beside a FID: none for Inception, whose FID papers print."""
        found = self._extractor
        if found is None or isinstance(found, InceptionFeatures):
            return ""
        return found.name if isinstance(found, ModuleFeatures) else type(found).__name__

    def need_extractor(self, option: str) -> None:
        """Load the network now, before images and models.

        Args:
            option: The option of a command that sets it, for the message.

        Raises:
            ConfigError: If its weights are not here and cannot be downloaded.
        """
        try:
            _ = self.extractor
        except ConfigError as error:
            raise without_weights(error, option) from error

    def setup(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, stage: str) -> None:
        """Forget the real images, as the next call may have others; load a default extractor."""
        super().setup(trainer, pl_module, stage)
        self._scores = None
        self._is_off = False
        if stage == "predict":  # which measures nothing
            return
        problem = None
        try:
            _ = self.extractor
        except ConfigError as error:
            problem = error
        # All ranks measure or none does.
        self._is_off = trainer.strategy.reduce_boolean_decision(problem is not None, all=False)
        if problem is not None and stage == "test":  # which is nothing but the scores
            raise problem
        reference = self.reference
        if reference not in (None, "train") and not Path(str(reference)).is_file():
            raise ConfigError(
                f"reference: must be a file of ImageStatistics, or train, {found_at(reference)}"
            )
        if self._is_off:
            rank_zero_warn(
                f"GenerationMetrics: this run has no FID and no other score: {problem}; if none is "
                "wanted, `--scores false` leaves GenerationMetrics out"
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Measure, unless this is the sanity check or not yet due."""
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        fitting = trainer.state.fn == "fit"
        if not trainer.sanity_checking and (due or not fitting) and not self._is_off:
            self._measure(trainer, pl_module, prefix="val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Measure."""
        self._measure(trainer, pl_module, prefix="test")

    def state_dict(self) -> dict[str, Any]:
        """The scores so far, so that a resumed run continues their curves.

        And whether there are none because the network that scores had no weights.
        """
        return {"history": dict(self._history), "is_off": self._is_off}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the scores of a checkpoint."""
        self._history = dict(state_dict["history"])

    def new_scores(
        self,
        data: ImageDataModule,
        *,
        seed: int,
        device: torch.device | str,
        cache_dir: Path | None = None,
        progress: Callable[[str], ProgressDisplay] | None = None,
    ) -> GenerationScores:
        """A `GenerationScores` with the real images. Collective: every rank must call it.

        Args:
            data: Data module with the held-out and training images.
            seed: Seed of subsets, splits and halves.
            device: Device that computes the features.
            cache_dir: Folder for statistics if the callback has no `cache_dir`.
            progress: Makes a display for what is counted, in the plural.
        """
        cache = cache_dir if self.cache_dir is None else Path(self.cache_dir)

        def statistics(images: ImageDataset) -> ImageStatistics:
            name = "training images" if images is data.train_images else "held-out images"
            shown = None if progress is None else progress(f"{name} read")
            with shown or nullcontext():
                return real_statistics(
                    images,
                    self.extractor,
                    cache_dir=cache,
                    device=device,
                    on_progress=None if shown is None else shown.show,
                )

        if self.reference == "train":
            real = statistics(data.train_images)
        elif self.reference is None:
            real = statistics(data.held_out_images)
        else:
            real = ImageStatistics.load(self.reference)
        train = statistics(data.train_images) if self.with_train else None
        scores = GenerationScores(self.extractor, real=real, train=train, k=self.k, seed=seed)
        return scores.to(device)

    def about(self, scores: dict[str, float], kind: str = "generated") -> str:
        """In a line, what a FID and the other scores are of: the network, and the images.

        Args:
            scores: What `GenerationScores` computed.
            kind: What the scored images are called.
        """
        network = self.extractor.title or type(self.extractor).__name__
        names = {None: "held-out images", "train": "training images"}
        real = names.get(self.reference, f"images of {self.reference}")
        count = f"{scores['num_real']:,.0f} " if "num_real" in scores else ""
        return (
            f"features of {network} ({self.extractor.name}), {scores['num_images']:,.0f} {kind} "
            f"images against {count}{real}"
        )

    def _measure(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, *, prefix: str) -> None:
        data = needed_image_data(trainer, "GenerationMetrics")
        num_images = self.num_images or len(data.held_out_images)
        if num_images < trainer.world_size:
            raise ConfigError(
                f"num_images: each of {trainer.world_size} ranks needs an image, found {num_images}"
            )
        seed = pl_module.seed if self.seed is None else self.seed
        # Kept until the next `setup`: it holds the features of all real images.
        if self._scores is None:
            if trainer.is_global_zero:
                warn_of_empty_classes(data, pl_module.num_classes)
            logs = trainer.logger and trainer.logger.save_dir
            self._scores = self.new_scores(
                data,
                seed=seed,
                device=pl_module.device,
                cache_dir=Path(logs) / "reference_cache" if logs else None,
                progress=partial(progress_of, trainer),
            )
        metric = self._scores
        mine = range(trainer.global_rank, num_images, trainer.world_size)
        drawn = progress_of(trainer, "images drawn for the scores", total=num_images)
        # The ranks' numbers of batches may differ by one.
        with pl_module.uneven_calls(), showing_steps(pl_module, drawn):
            for start in range(0, len(mine), self.batch_size):
                batch = mine[start : start + self.batch_size]
                metric.update(to_uint8(pl_module.sample(batch, seed=self.seed)))
                drawn.show(min(num_images, (start + len(batch)) * trainer.world_size), num_images)
        scores = metric.compute()
        # Of the images of all ranks, in the order of their indices.
        logits = metric.generated.compute().logits
        if logits is not None and logits.shape[1] == pl_module.num_classes:
            # Image i was drawn with class i modulo the number of classes.
            asked = torch.arange(num_images, device=logits.device) % pl_module.num_classes
            scores["class_agreement"] = (logits.argmax(1) == asked).double().mean().item()
        metric.reset()
        self.last_scores = scores
        named = {f"{prefix}/{name}": value for name, value in scores.items()}
        # `compute` has synchronised the ranks, so all have the same scores.
        pl_module.log_dict(named, rank_zero_only=True)
        step = steps_of(trainer, pl_module)
        self._history[step] = scores
        row = {
            "stage": prefix,
            "scores": scores,
            "extractor": self.extractor.name,
            "reference": self.reference or "held-out images",
            "step": step,
            "sampler": str(pl_module.sampler),
            "guidance_scale": pl_module.guidance_scale,
            "seed": seed,
            "k": self.k,
        }
        append_row(trainer, "generation_metrics.jsonl", row)
        command = trainer.state.fn
        if trainer.is_global_zero and command is not None and command != "fit":
            print(f"{command.value}: {self.about(scores)}", flush=True)
        if trainer.is_global_zero:
            save_figure(
                trainer,
                quality_history(self._history, network=self.scored_by),
                tag="2_quality/history",
                explain="FID is good when it reaches the dashed line; generated images much nearer "
                "to training images than held-out ones are copies.",
            )
