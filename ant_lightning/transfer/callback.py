"""`NegativeTransferGap`: compares a checkpoint with a specialist for each interval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, ClassVar

from ant_lightning.callbacks.base import RunCallback, callback_of
from ant_lightning.callbacks.ema import EMA, averaged_weights
from ant_lightning.callbacks.figures import append_row, save_figure
from ant_lightning.callbacks.fixed_loss import FixedLoss
from ant_lightning.callbacks.progress import progress_of
from ant_lightning.data.module import needed_image_data
from ant_lightning.errors import ConfigError, check_at_least
from ant_lightning.generation.extractor import FeatureExtractor
from ant_lightning.generation.frechet import GaussianStatistics, frechet_distance
from ant_lightning.generation.reference import real_statistics
from ant_lightning.generation.statistics import ImageStatistics
from ant_lightning.runtime.sharded_backbone import refuse_shards
from ant_lightning.tasks.time_axis import TimeAxis
from ant_lightning.transfer.figure import transfer_gap_bars
from ant_lightning.transfer.gap import negative_transfer_gap
from ant_lightning.transfer.result import IntervalGap, TransferGapResult
from ant_lightning.transfer.specialists import Specialist, find_specialists, specialist_network
from ant_lightning.transfer.switching import SpecialistSampler, using_network

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning as L
    import torch
    from torch import Tensor, nn

    from ant_lightning.data.dataset import ImageDataset
    from ant_lightning.data.module import ImageDataModule
    from ant_lightning.models.module import MultiTaskDiffusion
    from ant_lightning.runtime.progress_display import ProgressDisplay


class NegativeTransferGap(RunCallback):
    """During `validate`, compares the model with a specialist for each interval of timesteps.

    The loss gap is the specialist's held-out loss inside its interval minus the model's, with the
    same images, timesteps and noise. For the FID gap, the specialist samples inside its interval
    and the model outside; the gap is the FID of these images minus that of the model's own images
    with the same indices. A gap below 0 is negative transfer. Both gaps have a bootstrap interval
    over images. It does not cover other trainings, which need other seeds.

    Specialists are runs of `fit` with `model.timesteps.interval`. After the same number of
    iterations a specialist has seen about k times as many images of its interval as the multi-task
    model, k being the number of clusters. For `by_samples`, use checkpoints that saw as many as the
    model, for instance those after a k-th of the steps.

    Ranks share the images. The result is appended to `negative_transfer_gap.jsonl` in the run's
    folder, which `TransferGapResult.load` reads, and drawn as bars. In `fit` the callback does
    nothing.

    Args:
        by_iterations: Checkpoints, one for each interval, of specialists trained for as many
            iterations as the model.
        by_samples: Checkpoints, one for each interval, of specialists that saw as many images of
            their interval as the model.
        intervals: `[start, stop)` each; by default the model's clusters.
        extractor: Extractor of image features; `None` for the loss gap alone.
        num_images: Images of each FID; by default as many as are held out.
        batch_size: Images, or losses, computed at once.
        num_draws: Timesteps drawn for each held-out image; its loss is their mean.
        num_held_out: Held-out images of the loss gap; by default all.
        num_resamples: Bootstrap samples of the FID gap; the loss gap has 1000.
        reference: File of reference statistics; by default those of the held-out images.
        cache_dir: Folder for statistics of real images; `None` to compute them each time.
        seed: Seed of images and noise; by default that of the module.

    Raises:
        ConfigError: If a number is out of its range or no specialists are given; in `validate`, if
            one is missing or does not fit the model.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 3, arXiv 2306.00354.

    Examples:
        >>> from ant_lightning import NegativeTransferGap
        >>> gap = NegativeTransferGap(by_samples=["low.ckpt", "high.ckpt"], num_draws=4)
        >>> gap.paths["samples"]
        ['low.ckpt', 'high.ckpt']
    """

    result: TransferGapResult | None
    run_state: ClassVar = {"result": NoneType}

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
        check_at_least(2, num_images=num_images, num_held_out=num_held_out)
        check_at_least(1, batch_size=batch_size, num_draws=num_draws)
        check_at_least(0, num_resamples=num_resamples)
        super().__init__()
        self.paths = {"iterations": by_iterations, "samples": by_samples}
        if not any(self.paths.values()):
            raise ConfigError(
                "by_iterations: must name the specialists' checkpoints if by_samples does not, "
                "found neither"
            )
        self.intervals = intervals
        self.extractor = extractor
        self.num_images = num_images
        self.batch_size = batch_size
        self.num_draws = num_draws
        self.num_held_out = num_held_out
        self.num_resamples = num_resamples
        self.reference = reference
        self.cache_dir = cache_dir
        self.seed = seed
        self._specialists: list[Specialist] = []

    def setup(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, stage: str) -> None:
        """Refuse sharded weights: each specialist is a whole network."""
        super().setup(trainer, pl_module, stage)
        if stage == "validate":
            refuse_shards(trainer, self)

    def on_validation_start(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Check the specialists before anything is computed."""
        if trainer.state.fn != "validate":
            return
        self._specialists = find_specialists(pl_module, self.paths, self.intervals)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Measure and publish."""
        if trainer.state.fn != "validate":
            return
        data = needed_image_data(trainer, "NegativeTransferGap")
        total = (1 + len(self._specialists)) * (1 if self.extractor is None else 2)
        with (
            averaged_weights(trainer, pl_module),
            progress_of(trainer, "networks measured", total=total) as bar,
        ):
            result = self._loss_gaps(pl_module, data.held_out_images, bar)
            if self.extractor is not None:
                result = self._with_fid_gaps(result, self.extractor, pl_module, data, bar)
        self.result = result
        self._publish(trainer, pl_module, result)

    def _seed(self, pl_module: MultiTaskDiffusion) -> int:
        return pl_module.seed if self.seed is None else self.seed

    def _networks(self, pl_module: MultiTaskDiffusion, bar: ProgressDisplay) -> Iterator[nn.Module]:
        """The network of each specialist; one at a time is on the device."""
        # Like against like: EMA weights of the specialists if the model is measured with its own.
        averaged = callback_of(pl_module.trainer, EMA) is not None
        bar.update()  # the multi-task model was measured before the first specialist
        for specialist in self._specialists:
            yield specialist_network(pl_module, specialist, averaged=averaged)
            bar.update()

    def _loss_gaps(
        self, pl_module: MultiTaskDiffusion, dataset: ImageDataset, bar: ProgressDisplay
    ) -> TransferGapResult:
        """The loss gap of every specialist."""
        num_held_out = min(len(dataset), self.num_held_out or len(dataset))
        # Ranks share the images, and each needs one.
        check_at_least(pl_module.trainer.world_size, num_held_out=num_held_out)
        seed, num_draws = self._seed(pl_module), self.num_draws
        loss = FixedLoss(
            pl_module, dataset, num_images=num_held_out, batch_size=self.batch_size, seed=seed
        )
        # By interval: specialists of both budgets are compared with the same losses.
        multitask = {
            each.interval: loss.in_interval(*each.interval, num_draws=num_draws)
            for each in self._specialists
        }
        gaps = []
        networks = self._networks(pl_module, bar)
        for specialist, network in zip(self._specialists, networks, strict=True):
            with using_network(pl_module, network):
                own = loss.in_interval(*specialist.interval, num_draws=num_draws)
            of_all = multitask[specialist.interval]
            # Resampling a mean costs next to nothing; each resample of FID needs a covariance.
            (gap,) = negative_transfer_gap(
                [own], of_all, statistic=_mean, num_resamples=1000, seed=seed
            )
            start, stop = specialist.interval
            gaps.append(
                IntervalGap(
                    start=start,
                    stop=stop,
                    budget=specialist.budget,
                    specialist_steps=specialist.steps,
                    multitask_loss=_mean(of_all),
                    specialist_loss=_mean(own),
                    loss_gap=gap,
                )
            )
        return TransferGapResult(
            gaps=tuple(gaps),
            multitask_steps=pl_module.trained_steps,
            num_images=0,  # no FID yet: see `_with_fid_gaps`
            num_held_out=num_held_out,
        )

    def _with_fid_gaps(
        self,
        result: TransferGapResult,
        extractor: FeatureExtractor,
        pl_module: MultiTaskDiffusion,
        data: ImageDataModule,
        bar: ProgressDisplay,
    ) -> TransferGapResult:
        """The result with the FID gap of every specialist."""
        trainer, seed = pl_module.trainer, self._seed(pl_module)
        num_images = self.num_images or len(data.held_out_images)
        check_at_least(trainer.world_size, num_images=num_images)
        reference = self._reference(extractor.to(pl_module.device), data, pl_module.device)

        def fid(rows: Tensor) -> float:
            return frechet_distance(GaussianStatistics.from_features(rows), reference)

        intervals = [each.interval for each in self._specialists]
        sampler = SpecialistSampler(pl_module, intervals, seed=seed)
        own = range(trainer.global_rank, num_images, trainer.world_size)
        batches = [own[i : i + self.batch_size] for i in range(0, len(own), self.batch_size)]
        multitask = sampler.features(extractor, batches)
        networks = self._networks(pl_module, bar)
        specialists = [
            sampler.features(extractor, batches, (network, interval))
            for network, interval in zip(networks, intervals, strict=True)
        ]
        # One call for all: every specialist then has the same resamples.
        fid_gaps = negative_transfer_gap(
            specialists, multitask, statistic=fid, num_resamples=self.num_resamples, seed=seed
        )
        base = fid(multitask)
        # The steps before an interval belong to the model's own trajectory: computed once.
        num_steps = sampler.num_steps * (1 + len(intervals))
        return replace(
            result,
            gaps=tuple(
                replace(gap, fid_gap=each, multitask_fid=base, specialist_fid=base + each.value)
                for gap, each in zip(result.gaps, fid_gaps, strict=True)
            ),
            num_images=num_images,
            sampler_steps=num_steps - sum(sampler.first_step[each] for each in intervals),
            sampler_steps_unshared=num_steps,
        )

    def _reference(
        self, extractor: FeatureExtractor, data: ImageDataModule, device: torch.device
    ) -> GaussianStatistics:
        """Moments of the features of real images."""
        if self.reference is not None:
            real = ImageStatistics.load(self.reference)
        else:
            cache = None if self.cache_dir is None else Path(self.cache_dir)
            real = real_statistics(data.held_out_images, extractor, cache_dir=cache, device=device)
        real.check(extractor)
        return real.gaussian

    def _publish(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, result: TransferGapResult
    ) -> None:
        """Log the gaps, append them to the file, and draw them."""
        numbers = {}
        for budget in result.budgets:
            for task, gap in enumerate(result.of_budget(budget)):
                numbers[f"ntg/{budget}/task_{task}/loss"] = gap.loss_gap.value
                if result.num_images:
                    numbers[f"ntg/{budget}/task_{task}/fid"] = gap.fid_gap.value
        pl_module.log_dict(numbers, rank_zero_only=True)
        if not trainer.is_global_zero:
            return
        row = {
            **result.row(),
            "sampler": str(pl_module.sampler),
            "guidance_scale": pl_module.guidance_scale,
            "extractor": self.extractor and self.extractor.name,
            "seed": self._seed(pl_module),
        }
        append_row(trainer, "negative_transfer_gap.jsonl", row)
        figure = transfer_gap_bars({"this model": result}, time=TimeAxis.of(pl_module.process))
        explain = "Below 0 is negative transfer: a model of the interval alone is better there."
        save_figure(trainer, figure, tag="6_transfer/negative_transfer_gap", explain=explain)


def _mean(losses: Tensor) -> float:
    return float(losses.mean())
