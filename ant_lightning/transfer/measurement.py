"""Measures the negative-transfer gap of a model against its specialists, shared by all ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torchmetrics import CatMetric

from ant_lightning.data.module import to_uint8
from ant_lightning.generation.extractor import FeatureExtractor
from ant_lightning.generation.features import ImageFeatures
from ant_lightning.generation.frechet import GaussianStatistics, frechet_distance
from ant_lightning.transfer.gap import negative_transfer_gap
from ant_lightning.transfer.interval_losses import interval_losses
from ant_lightning.transfer.result import IntervalGap, TransferGapResult
from ant_lightning.transfer.specialists import Specialist, specialist_network
from ant_lightning.transfer.switching import Entry, sample_and_mark, sample_switched, using_network

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from ant_lightning.data.loader import ImageDataset
    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["GapSettings", "measure_gaps"]


@dataclass(frozen=True, kw_only=True)
class GapSettings:
    """How gaps are measured; see `NegativeTransferGap`.

    Attributes:
        num_held_out: Images of the loss gap.
        num_draws: Timesteps of each of them.
        num_images: Generated images of each FID.
        batch_size: Images at once.
        num_resamples: Bootstrap samples of the FID gap.
        seed: Of everything that is drawn.
        extractor: For the FID gap; None to leave it out.
        reference: Moments of the features of real images, with an extractor.
    """

    num_held_out: int
    num_draws: int
    num_images: int
    batch_size: int
    num_resamples: int
    seed: int
    extractor: FeatureExtractor | None
    reference: GaussianStatistics | None


def measure_gaps(
    module: MultiTaskDiffusion,
    dataset: ImageDataset,
    specialists: Sequence[Specialist],
    settings: GapSettings,
    *,
    averaged: bool,
    on_progress: Callable[[], object],
) -> TransferGapResult:
    """Both gaps of every specialist; every rank gets the same.

    Args:
        module: With the weights to be measured, on every rank.
        dataset: Held-out images.
        specialists: What to compare it with.
        settings: How.
        averaged: Whether the specialists' EMA weights are wanted.
        on_progress: Called after the model and after each specialist.
    """
    intervals = list(dict.fromkeys(each.interval for each in specialists))
    own_losses = {each: _losses(module, dataset, each, settings) for each in intervals}
    own = _own_features(module, intervals, settings)
    on_progress()
    losses, features = [], []
    for specialist in specialists:
        network = specialist_network(module, specialist, averaged=averaged).to(module.device)
        with using_network(module, network):
            losses.append(_losses(module, dataset, specialist.interval, settings))
        if own is not None:
            place = intervals.index(specialist.interval)
            entries = [batch[place] for batch in own.entries]
            features.append(_features(module, network, specialist.interval, entries, settings))
        on_progress()
    gaps = [
        _loss_gap(specialist, own_losses[specialist.interval], each, settings.seed)
        for specialist, each in zip(specialists, losses, strict=True)
    ]
    whole, computed = 0, 0
    if own is not None:
        gaps = _with_fid(gaps, own.features, features, settings)
        first = own.entries[0]
        whole = first[0].num_steps
        computed = whole
        for specialist in specialists:
            computed += whole - first[intervals.index(specialist.interval)].step
    return TransferGapResult(
        gaps=tuple(gaps),
        multitask_steps=module.trained_steps,
        num_images=settings.num_images if own is not None else 0,
        num_held_out=settings.num_held_out,
        sampler_steps=computed,
        sampler_steps_unshared=whole * (1 + len(specialists)),
    )


@dataclass(frozen=True)
class _OwnSamples:
    """Features of the multi-task model's images, and the entries of each batch of this rank."""

    features: Tensor
    entries: list[list[Entry]]


def _losses(
    module: MultiTaskDiffusion,
    dataset: ImageDataset,
    interval: tuple[int, int],
    settings: GapSettings,
) -> Tensor:
    """Losses `[n]` of all ranks, in the order of the images."""
    trainer = module.trainer
    own = interval_losses(
        module,
        dataset,
        range(trainer.global_rank, settings.num_held_out, trainer.world_size),
        interval,
        num_draws=settings.num_draws,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    ranks = range(trainer.world_size)
    of_all = CatMetric().set_dtype(torch.float64).to(module.device)
    of_all.update(own.to(module.device))
    order = torch.cat([torch.arange(r, settings.num_held_out, len(ranks)) for r in ranks]).argsort()
    losses: Tensor = of_all.compute().cpu()[order]
    return losses


def _batches(module: MultiTaskDiffusion, settings: GapSettings) -> list[range]:
    """Indices of the images that this rank draws."""
    trainer, size = module.trainer, settings.batch_size
    mine = range(trainer.global_rank, settings.num_images, trainer.world_size)
    return [mine[i : i + size] for i in range(0, len(mine), size)]


def _own_features(
    module: MultiTaskDiffusion, intervals: Sequence[tuple[int, int]], settings: GapSettings
) -> _OwnSamples | None:
    if settings.extractor is None:
        return None
    entries: list[list[Entry]] = []

    def images() -> Iterator[Tensor]:
        for batch in _batches(module, settings):
            drawn, marks = sample_and_mark(module, batch, intervals, seed=settings.seed)
            entries.append(marks)
            yield to_uint8(drawn)

    return _OwnSamples(_features_of(images(), settings.extractor, module), entries)


def _features(
    module: MultiTaskDiffusion,
    network: nn.Module,
    interval: tuple[int, int],
    entries: Sequence[Entry],
    settings: GapSettings,
) -> Tensor:
    assert settings.extractor is not None
    images = (
        to_uint8(sample_switched(module, network, interval, entry, batch, seed=settings.seed))
        for batch, entry in zip(_batches(module, settings), entries, strict=True)
    )
    return _features_of(images, settings.extractor, module)


def _features_of(
    batches: Iterable[Tensor], extractor: FeatureExtractor, module: MultiTaskDiffusion
) -> Tensor:
    """Features `[n, d]` of the images of all ranks, in their order."""
    metric = ImageFeatures(extractor).to(module.device)
    for images in batches:
        metric.update(images)
    features = metric.compute().features
    assert features is not None
    return features


def _loss_gap(specialist: Specialist, multitask: Tensor, losses: Tensor, seed: int) -> IntervalGap:
    (gap,) = negative_transfer_gap(
        [losses], multitask, statistic=_mean, seed=seed, num_resamples=1000
    )
    return IntervalGap(
        start=specialist.interval[0],
        stop=specialist.interval[1],
        budget=specialist.budget,
        specialist_steps=specialist.steps,
        multitask_loss=_mean(multitask),
        specialist_loss=_mean(losses),
        loss_gap=gap,
    )


def _with_fid(
    gaps: Sequence[IntervalGap], own: Tensor, features: Sequence[Tensor], settings: GapSettings
) -> list[IntervalGap]:
    reference = settings.reference
    assert reference is not None

    def fid(rows: Tensor) -> float:
        return frechet_distance(GaussianStatistics.from_features(rows), reference)

    found = negative_transfer_gap(
        features, own, statistic=fid, num_resamples=settings.num_resamples, seed=settings.seed
    )
    base = fid(own)
    return [
        replace(gap, fid_gap=each, multitask_fid=base, specialist_fid=base + each.value)
        for gap, each in zip(gaps, found, strict=True)
    ]


def _mean(losses: Tensor) -> float:
    return float(losses.mean())
