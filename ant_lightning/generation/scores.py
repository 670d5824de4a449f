"""Every metric of generated images at once, each beside the companions that make it readable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError
from ant_lightning.generation.collect import collect_features
from ant_lightning.generation.extractors.features import FeatureExtractor, Features
from ant_lightning.generation.frechet import frechet_distance, warn_if_rank_deficient
from ant_lightning.generation.inception_score import inception_score
from ant_lightning.generation.kid import kernel_distance
from ant_lightning.generation.moments import GaussianStatistics
from ant_lightning.generation.nearest import nearest_distance
from ant_lightning.generation.precision_recall import precision_recall
from ant_lightning.generation.reference import ReferenceStatistics

__all__ = ["GenerationScores"]

ImageBatches = Tensor | Iterable[Tensor]


@dataclass(frozen=True, kw_only=True)
class GenerationScores:
    """FID, KID, Inception score, precision and recall of generated images, with companions.

    The result maps names to numbers:

    - ``fid``, ``kid``, ``kid_std``, ``precision``, ``recall``: generated against real;
      ``inception_score`` and its ``_std`` where the extractor has logits.
    - ``fid_real``: real against real. With training images: as many random training images as
      there are generated ones, in their place. Without: two disjoint random halves of the real
      images. ``fid_real_num_images`` says how many (of each half). A FID below it says nothing,
      unless ``fid_train`` and ``nearest_train`` show that the model copies.
    - ``fid_train``: generated against as many random training images as there are real ones.
    - ``nearest_train_mean``, ``nearest_train_median``: feature distance of generated images to the
      nearest training image; ``nearest_train_real_mean`` and ``_median`` the same of real images,
      which are to be held out then.
    - ``num_images`` generated, ``num_real`` (where known).

    A reference without kept features (an ADM file) gives ``fid`` alone of what needs real images.

    Args:
        k: Neighbour of precision and recall; 0 leaves these two out.
        kid_subset_size: Images per KID subset; at most all of the smaller set are taken. Where
            that is all of both sets, KID is computed once and has no ``kid_std``.
        kid_num_subsets: KID subsets.
        num_splits: Splits of the Inception score; at most one per image.
        batch_size: Images per forward.
        seed: Of subsets, splits and halves.
    """

    k: int = 3
    kid_subset_size: int = 1000
    kid_num_subsets: int = 100
    num_splits: int = 10
    batch_size: int = 100
    seed: int = 2020

    def evaluate(
        self,
        generated_images: ImageBatches,
        reference: ImageBatches | ReferenceStatistics,
        extractor: FeatureExtractor,
        *,
        train_images: ImageBatches | None = None,
    ) -> dict[str, float]:
        """Scores of uint8 images ``[n, c, h, w]``, one pass over each set.

        Args:
            generated_images: One tensor, or an iterable of batches.
            reference: The real images in the same form, or their statistics.
            extractor: Gives the features.
            train_images: The training images; the companions that need them are left out
                without.

        Raises:
            ConfigError: Too few images, features that are not finite, or a reference of another
                extractor, feature dimension or image shape.
        """
        generated_images, shape = _peek(generated_images)
        if not isinstance(reference, ReferenceStatistics):
            images, real_shape = _peek(reference)
            reference = ReferenceStatistics.from_features(
                collect_features(images, extractor, batch_size=self.batch_size).features,
                extractor=extractor.name,
                image_shape=real_shape,
            )
        reference.check(
            num_features=extractor.num_features, extractor=extractor.name, image_shape=shape
        )
        train = None
        if train_images is not None:
            train = collect_features(train_images, extractor, batch_size=self.batch_size).features
        generated = collect_features(generated_images, extractor, batch_size=self.batch_size)
        return self.score(generated, reference, train=train)

    def score(
        self, generated: Features, reference: ReferenceStatistics, *, train: Tensor | None = None
    ) -> dict[str, float]:
        """Scores of features that are there already, for instance gathered from all ranks.

        Subsets and splits depend on the order of the images: put gathered features into the order
        of the image index, and the values do not depend on the number of ranks.

        Args:
            generated: Features ``[n, d]`` and logits of the generated images.
            reference: Statistics of the real images.
            train: Features ``[m, d]`` of the training images.

        Raises:
            ConfigError: Too few images, or dimensions that differ.
        """
        features, logits = generated
        num_images, num_features = features.shape
        reference.check(num_features=num_features)
        if num_images <= self.k:
            raise ConfigError(
                f"num_images must be more than k = {self.k} for precision and recall, "
                f"got {num_images}"
            )
        warn_if_rank_deficient(num_images, num_features, what="generated images")
        own = GaussianStatistics.from_features(features)
        scores = {
            "fid": frechet_distance(own, reference.gaussian),
            "num_images": float(num_images),
        }
        if reference.gaussian.num_samples is not None:
            warn_if_rank_deficient(reference.gaussian.num_samples, num_features, what="real images")
            scores["num_real"] = float(reference.gaussian.num_samples)
        if logits is not None:
            splits = min(self.num_splits, num_images)
            score = inception_score(logits, num_splits=splits, seed=self.seed)
            scores |= {"inception_score": score.mean, "inception_score_std": score.std}
        if reference.features is not None:
            scores |= self._against_real(features, reference.features.to(features.device))
            if train is None:
                scores |= self._halves(reference.features, len(features))
        if train is not None:
            train = train.to(features.device)
            scores |= self._against_train(own, features, reference.features, train)
        return scores

    def _against_real(self, generated: Tensor, real: Tensor) -> dict[str, float]:
        """What needs the real features themselves."""
        size = min(self.kid_subset_size, len(generated), len(real))
        # subsets of all images would be one and the same: their spread of 0 would mislead
        whole = size == len(generated) == len(real)
        kid = kernel_distance(
            real,
            generated,
            subset_size=size,
            num_subsets=1 if whole else self.kid_num_subsets,
            seed=self.seed,
        )
        scores = {"kid": kid.mean}
        if self.k:
            precision, recall = precision_recall(real, generated, k=self.k)
            scores |= {"precision": precision, "recall": recall}
        if not whole:
            scores["kid_std"] = kid.std
        return scores

    def _halves(self, real: Tensor, count: int) -> dict[str, float]:
        """FID between two disjoint random parts of the real images."""
        half = min(count, len(real) // 2)
        if half < 2:
            return {}
        order = self._permutation(len(real))
        first, second = (
            GaussianStatistics.from_features(real[rows])
            for rows in (order[:half], order[half : 2 * half])
        )
        return {
            "fid_real": frechet_distance(first, second),
            "fid_real_num_images": float(half),
        }

    def _against_train(
        self, own: GaussianStatistics, generated: Tensor, real: Tensor | None, train: Tensor
    ) -> dict[str, float]:
        """What shows whether the model copies its training images."""
        count = len(train) if real is None else min(len(real), len(train))
        order = self._permutation(len(train))
        part = GaussianStatistics.from_features(train[order[:count]])
        scores = {"fid_train": frechet_distance(own, part)}
        if real is not None:
            same = train[order[: len(generated)]]
            scores["fid_real"] = frechet_distance(
                GaussianStatistics.from_features(same), GaussianStatistics.from_features(real)
            )
            scores["fid_real_num_images"] = float(len(same))
        sets = {"nearest_train": generated}
        if real is not None:
            sets["nearest_train_real"] = real.to(generated.device)
        for name, queries in sets.items():
            distances = nearest_distance(queries, train)
            scores[f"{name}_mean"] = distances.mean().item()
            scores[f"{name}_median"] = distances.quantile(0.5).item()
        return scores

    def _permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))


def _peek(images: ImageBatches) -> tuple[ImageBatches, tuple[int, int, int] | None]:
    """The same images, and the shape (c, h, w) of the first."""
    rest: ImageBatches = images
    if isinstance(images, Tensor):
        first = images
    else:
        iterator = iter(images)
        first = next(iterator, torch.empty(0))
        rest = chain([first], iterator)
    shape = tuple(first.shape[1:])
    return rest, (shape[0], shape[1], shape[2]) if len(shape) == 3 else None
