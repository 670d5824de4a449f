"""`ExpertComparison`: the base beside itself switched between, or merged with, its specialists."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar

from ant_lightning.callbacks.base import RunCallback, callback_of
from ant_lightning.callbacks.ema import EMA, averaged_weights
from ant_lightning.callbacks.figures import append_row
from ant_lightning.callbacks.fixed_loss import FixedLoss
from ant_lightning.data.batch import to_uint8
from ant_lightning.data.module import needed_image_data
from ant_lightning.errors import check_at_least
from ant_lightning.generation.extractor import FeatureExtractor
from ant_lightning.generation.features import ImageFeatures
from ant_lightning.generation.frechet import GaussianStatistics, frechet_distance
from ant_lightning.generation.reference import real_statistics
from ant_lightning.runtime.sharded_backbone import refuse_shards
from ant_lightning.transfer.experts import interval_shares, merged_network, switched_network
from ant_lightning.transfer.switching import using_network

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning as L
    from torch import nn

    from ant_lightning.data.module import ImageDataModule
    from ant_lightning.models.module import MultiTaskDiffusion


class ExpertComparison(RunCallback):
    """During `validate`, compares a model with its specialists added: switched, or merged.

    For `base`, `switched` and `merged` it takes the held-out loss over the whole noise axis and
    inside each specialist's interval, with the same images, timesteps and noise, and the FID of
    images with the same indices. The row is appended to `interval_experts.jsonl` in the run's
    folder, which `ant-lightning report` shows. In `fit` the callback does nothing.

    Args:
        specialists: Checkpoints that were trained with `timesteps.interval`.
        merge_weights: Weight of each in the merge; by default its share of the noise axis.
        extractor: Extractor of image features; `None` for the losses alone.
        num_images: Images of each FID; by default as many as are held out.
        batch_size: Images, or losses, computed at once.
        num_draws: Timesteps of each held-out image.
        num_held_out: Held-out images of the losses; by default all.
        cache_dir: Folder for statistics of real images; `None` to compute them each time.
        seed: Seed of images and noise; by default that of the module.

    Raises:
        ConfigError: If a number is out of its range; in `validate`, if a specialist does not fit.

    Reference:
        Ma et al., "Decouple-Then-Merge", arXiv 2410.06664 (the merge).

    Examples:
        >>> from ant_lightning import ExpertComparison
        >>> comparison = ExpertComparison(specialists=["low.ckpt", "high.ckpt"])
        >>> print(comparison.result)  # after `Trainer(callbacks=[comparison]).validate(...)`
        None
    """

    result: dict[str, dict[str, float]] | None
    run_state: ClassVar = {"result": NoneType}

    def __init__(
        self,
        *,
        specialists: list[str],
        merge_weights: list[float] | None = None,
        extractor: FeatureExtractor | None = None,
        num_images: int | None = None,
        batch_size: int = 250,
        num_draws: int = 4,
        num_held_out: int | None = None,
        cache_dir: str | None = None,
        seed: int | None = None,
    ) -> None:
        check_at_least(2, num_images=num_images, num_held_out=num_held_out)
        check_at_least(1, batch_size=batch_size, num_draws=num_draws)
        super().__init__()
        self.specialists = specialists
        self.merge_weights = merge_weights
        self.extractor = extractor
        self.num_images = num_images
        self.batch_size = batch_size
        self.num_draws = num_draws
        self.num_held_out = num_held_out
        self.cache_dir = cache_dir
        self.seed = seed

    def setup(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, stage: str) -> None:
        """Refuse sharded weights: each specialist is a whole network."""
        super().setup(trainer, pl_module, stage)
        if stage == "validate":
            refuse_shards(trainer, self)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Measure and publish."""
        if trainer.state.fn != "validate":
            return
        data = needed_image_data(trainer, "ExpertComparison")
        shares = interval_shares(pl_module, self.specialists)
        weights = list(shares.values()) if self.merge_weights is None else self.merge_weights
        models: dict[str, dict[str, float]] = {}
        with averaged_weights(trainer, pl_module):
            for name, network in self._networks(pl_module, weights):
                with using_network(pl_module, network):
                    models[name] = self._losses(pl_module, data, list(shares))
                    if self.extractor is not None:
                        models[name]["FID"] = self._fid(self.extractor, pl_module, data)
        self.result = models
        numbers = {f"experts/{m}/{n}": v for m, found in models.items() for n, v in found.items()}
        pl_module.log_dict(numbers, rank_zero_only=True)
        if trainer.is_global_zero:
            row: dict[str, Any] = {
                "step": pl_module.trained_steps,
                "models": models,
                "specialists": [str(each) for each in self.specialists],
                "merge_weights": weights,
                "sampler": str(pl_module.sampler),
                "extractor": self.extractor and self.extractor.name,
            }
            append_row(trainer, "interval_experts.jsonl", row)

    def _networks(
        self, pl_module: MultiTaskDiffusion, weights: list[float]
    ) -> Iterator[tuple[str, nn.Module]]:
        """The three networks by name; one beside the base at a time."""
        # Like against like: EMA weights of the specialists if the model is measured with its own.
        averaged = callback_of(pl_module.trainer, EMA) is not None
        yield "base", pl_module.backbone
        yield "switched", switched_network(pl_module, self.specialists, averaged=averaged)
        yield "merged", merged_network(pl_module, self.specialists, weights, averaged=averaged)

    def _losses(
        self, pl_module: MultiTaskDiffusion, data: ImageDataModule, intervals: list[tuple[int, int]]
    ) -> dict[str, float]:
        dataset = data.held_out_images
        num = min(len(dataset), self.num_held_out or len(dataset))
        check_at_least(pl_module.trainer.world_size, num_held_out=num)
        seed = pl_module.seed if self.seed is None else self.seed
        loss = FixedLoss(pl_module, dataset, num_images=num, batch_size=self.batch_size, seed=seed)
        places = {"loss": (0, pl_module.process.num_timesteps)}
        places |= {f"loss in [{start}, {stop})": (start, stop) for start, stop in intervals}
        return {
            name: float(loss.in_interval(*place, num_draws=self.num_draws).mean())
            for name, place in places.items()
        }

    def _fid(
        self, extractor: FeatureExtractor, pl_module: MultiTaskDiffusion, data: ImageDataModule
    ) -> float:
        trainer, device = pl_module.trainer, pl_module.device
        num_images = self.num_images or len(data.held_out_images)
        check_at_least(trainer.world_size, num_images=num_images)
        features = ImageFeatures(extractor.to(device)).to(device)
        own = list(range(trainer.global_rank, num_images, trainer.world_size))
        for first in range(0, len(own), self.batch_size):
            images = pl_module.sample(own[first : first + self.batch_size], seed=self.seed)
            features.update(to_uint8(images))
        found = features.compute().features
        assert found is not None  # `ImageFeatures` keeps them unless told otherwise
        cache = None if self.cache_dir is None else Path(self.cache_dir)
        real = real_statistics(data.held_out_images, extractor, cache_dir=cache, device=device)
        return frechet_distance(GaussianStatistics.from_features(found), real.gaussian)
