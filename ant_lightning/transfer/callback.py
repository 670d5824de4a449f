"""The negative-transfer gap of a checkpoint: where would a specialist do better?"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, ClassVar

from tqdm import tqdm

from ant_lightning.callbacks.base import RunCallback, callback_of
from ant_lightning.callbacks.ema import EMA, averaged_weights
from ant_lightning.callbacks.figures import log_folder, save_figure
from ant_lightning.data.of_trainer import needed_image_data
from ant_lightning.errors import ConfigError
from ant_lightning.generation.extractor import FeatureExtractor
from ant_lightning.generation.reference import real_statistics
from ant_lightning.generation.statistics import ImageStatistics
from ant_lightning.transfer.figure import transfer_gap_bars
from ant_lightning.transfer.measurement import GapSettings, measure_gaps
from ant_lightning.transfer.specialists import Specialist, check_intervals, find_specialists

if TYPE_CHECKING:
    import lightning as L

    from ant_lightning.data.module import ImageDataModule
    from ant_lightning.models.module import MultiTaskDiffusion
    from ant_lightning.transfer.result import TransferGapResult

__all__ = ["NegativeTransferGap"]


class NegativeTransferGap(RunCallback):
    """Compares the model of a `validate` with a specialist for each interval of timesteps.

    The loss gap is the specialist's held-out loss inside its interval minus the model's, with the
    same images, timesteps and noise. The FID gap is the FID with the specialist sampling inside
    its interval and the model outside, minus that of the model alone, for the same indices. Below
    0 is negative transfer. Both come with a bootstrap interval over images; it does not hold other
    trainings, which need other seeds.

    Specialists are runs of `fit` with `model.timesteps.interval`. With the iterations of the
    multi-task model one sees about k times more images of its interval; `by_samples` takes
    checkpoints that saw as many as it did, for instance after a k-th of the steps.

    Each rank draws its share of the images and of the losses. Written to `negative_transfer.npz`
    and, as a line of JSON, to `negative_transfer_gap.jsonl` in the log folder; drawn as bars. In
    `fit` it does nothing.

    Args:
        by_iterations: Checkpoint of each interval's specialist, with the model's iterations.
        by_samples: The same with the model's images of the interval.
        intervals: `[start, stop)` each; by default the model's clusters.
        extractor: What turns images into features; None for the loss gap alone.
        num_images: Images of each FID; by default as many as are held out.
        batch_size: Images, or losses, computed at once.
        num_draws: Timesteps of each held-out image's loss.
        num_held_out: Held-out images of the loss gap; by default all.
        num_resamples: Bootstrap samples of the FID gap; the loss gap has 1000.
        reference: File of reference statistics; by default of the held-out images.
        cache_dir: Where statistics of real images are kept; None for nowhere.
        seed: Of images and noise; by default that of the module.

    Raises:
        ConfigError: If a number is out of range, or no specialists are given; in `validate`, if
            one is missing or does not belong to the model.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 3, arXiv 2306.00354.
    """

    result: TransferGapResult | None
    of_run: ClassVar = {"result": NoneType}

    def __init__(
        self,
        *,
        by_iterations: list[str] | None = None,
        by_samples: list[str] | None = None,
        intervals: list[tuple[int, int]] | None = None,
        extractor: FeatureExtractor | None = None,
        num_images: int | None = None,
        batch_size: int = 250,
        num_draws: int = 16,
        num_held_out: int | None = None,
        num_resamples: int = 200,
        reference: str | None = None,
        cache_dir: str | None = None,
        seed: int | None = None,
    ) -> None:
        numbers = {
            "num_images": (num_images, 2),
            "batch_size": (batch_size, 1),
            "num_draws": (num_draws, 1),
            "num_held_out": (num_held_out, 2),
            "num_resamples": (num_resamples, 0),
        }
        for name, (value, least) in numbers.items():
            if value is not None and value < least:
                raise ConfigError(
                    f"NegativeTransferGap.{name}: must be at least {least}, found {value}"
                )
        super().__init__()
        self.paths = {"iterations": by_iterations, "samples": by_samples}
        if not any(self.paths.values()):
            raise ConfigError(
                "NegativeTransferGap: by_iterations or by_samples must name the specialists' "
                "checkpoints, found neither"
            )
        self.intervals = intervals
        self.extractor = extractor
        self.num_images = num_images
        self.batch_size = batch_size
        self.num_draws = num_draws
        self.num_held_out = num_held_out
        self.num_resamples = num_resamples
        self.reference_path = reference
        self.cache_dir = cache_dir
        self.seed = seed
        self._specialists: list[Specialist] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Look at the specialists before anything is computed."""
        if trainer.state.fn != "validate":
            return
        num_timesteps = pl_module.process.num_timesteps
        intervals = self.intervals or list(pairwise(pl_module.clusters.boundaries))
        intervals = [(int(start), int(stop)) for start, stop in intervals]
        check_intervals(intervals, num_timesteps)
        self._specialists = [
            specialist
            for budget, paths in self.paths.items()
            if paths
            for specialist in find_specialists(pl_module, paths, intervals, budget=budget)
        ]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Measure."""
        if trainer.state.fn != "validate":
            return
        data = needed_image_data(trainer, "NegativeTransferGap")
        settings = self._settings(trainer, pl_module, data)
        hidden = not trainer.is_global_zero or trainer.progress_bar_callback is None
        total = len(self._specialists) + 1
        with (
            averaged_weights(trainer, pl_module),
            tqdm(desc="negative transfer", total=total, leave=False, disable=hidden or None) as bar,
        ):
            self.result = measure_gaps(
                pl_module,
                data.held_out_images,
                self._specialists,
                settings,
                averaged=callback_of(trainer, EMA) is not None,
                on_progress=bar.update,
            )
        self._publish(trainer, pl_module, self.result)

    def _settings(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, data: ImageDataModule
    ) -> GapSettings:
        """The settings with the data's sizes and the moments of its real images."""
        held_out = len(data.held_out_images)
        counts = {
            "num_held_out": min(held_out, self.num_held_out or held_out),
            "num_images": self.num_images or held_out,
        }
        for name, count in counts.items():
            if count < trainer.world_size:
                raise ConfigError(
                    f"NegativeTransferGap.{name}: each of the {trainer.world_size} ranks needs an "
                    f"image, found {count}"
                )
        reference = None
        if self.extractor is not None:
            self.extractor.to(pl_module.device)
            if self.reference_path is not None:
                real = ImageStatistics.load(self.reference_path)
            else:
                cache = None if self.cache_dir is None else Path(self.cache_dir)
                real = real_statistics(
                    data,
                    data.held_out_images,
                    self.extractor,
                    cache_dir=cache,
                    device=pl_module.device,
                )
            real.check(self.extractor)
            reference = real.gaussian
        return GapSettings(
            **counts,
            num_draws=self.num_draws,
            batch_size=self.batch_size,
            num_resamples=self.num_resamples,
            seed=pl_module.seed if self.seed is None else self.seed,
            extractor=self.extractor,
            reference=reference,
        )

    def _publish(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, result: TransferGapResult
    ) -> None:
        numbers = {}
        for budget in result.budgets:
            for task, gap in enumerate(result.of_budget(budget)):
                numbers[f"ntg/{budget}/task_{task}/loss"] = gap.loss_gap.value
                if result.num_images:
                    numbers[f"ntg/{budget}/task_{task}/fid"] = gap.fid_gap.value
        pl_module.log_dict(numbers, rank_zero_only=True)
        if not trainer.is_global_zero:
            return
        folder = log_folder(trainer)
        result.save(folder / "negative_transfer.npz")
        row = {
            **result.row(),
            "sampler": str(pl_module.sampler),
            "guidance_scale": pl_module.guidance_scale,
            "extractor": self.extractor and self.extractor.name,
            "seed": pl_module.seed if self.seed is None else self.seed,
        }
        with (folder / "negative_transfer_gap.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        save_figure(
            trainer,
            transfer_gap_bars({"this model": result}),
            tag="6_transfer/negative_transfer_gap",
            explain="Below 0 is negative transfer: a model of the interval alone is better there.",
        )
