"""All scores of generated images, and the scores of real images to compare them with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchmetrics import Metric

from ant_lightning.errors import ConfigError
from ant_lightning.generation.features import ImageFeatures
from ant_lightning.generation.frechet import (
    GaussianStatistics,
    frechet_distance,
    warn_if_rank_deficient,
)
from ant_lightning.generation.inception_score import inception_score
from ant_lightning.generation.kid import kernel_distance
from ant_lightning.generation.neighbours import (
    NUM_NEIGHBOURS,
    nearest_distance,
    precision_recall,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.generation.extractor import FeatureExtractor
    from ant_lightning.generation.statistics import ImageStatistics


class GenerationScores(Metric):
    """FID, KID, Inception score, precision, recall and memorisation of generated images.

    `compute` maps names to numbers:

    - `fid`, `kid`, `kid_std`, `precision`, `recall`: generated against real images;
      `inception_score` and `inception_score_std` if the extractor gives logits.
    - `fid_real`, `kid_real`, `precision_real`, `recall_real`: what real images reach. With training
      images, as many of them as there are generated images are scored against the real images.
      Without, two disjoint random halves of the real images are scored against each other.
      `fid_real_num_images` is the number of images (in each half). A `fid` below `fid_real` is no
      improvement; `fid_train` and `nearest_train_*` show whether it comes from copies.
    - `fid_train`: generated images against random training images, as many as there are real ones.
    - `nearest_train_mean`, `nearest_train_median`: distance, in features, of generated images to
      the nearest training image; `nearest_train_real_*` is that of the real images, which must
      then be held out.
    - `num_images`: number of generated images; `num_real`: number of real ones, if known.

    If the statistics of the real images have no features, as in a file of the ADM evaluator, `fid`
    is the only score against real images. See `ImageFeatures` for several ranks.

    Args:
        extractor: Extractor of the features.
        real: Statistics of the real images.
        train: Statistics of the training images; `None` leaves out the scores that need them.
        k: Precision and recall use the distance to the k-th nearest neighbour; 0 leaves them out.
        kid_subset_size: Images per KID subset, cut to the size of the smaller set. If a subset is
            all of both sets, KID is computed once and has no `kid_std`.
        kid_num_subsets: KID subsets.
        num_splits: Splits of the Inception score; at most one per image.
        seed: Seed of subsets, splits and halves.

    Raises:
        ConfigError: If the real images have another extractor or another size; in `compute`, if
            there are too few images.

    Examples:
        >>> import torch
        >>> from ant_lightning import DigitsFeatures, GenerationScores, ImageFeatures
        >>> images = torch.randint(256, (99, 1, 8, 8), dtype=torch.uint8)
        >>> real = ImageFeatures(DigitsFeatures())
        >>> real.update(images)
        >>> scores = GenerationScores(DigitsFeatures(), real=real.compute())
        >>> scores.update(images)
        >>> found = scores.compute()
        >>> round(found["fid"], 4), found["precision"], found["recall"], found["num_images"]
        (0.0, 1.0, 1.0, 99.0)
    """

    full_state_update = False

    def __init__(
        self,
        extractor: FeatureExtractor,
        *,
        real: ImageStatistics,
        train: ImageStatistics | None = None,
        k: int = NUM_NEIGHBOURS,
        kid_subset_size: int = 1000,
        kid_num_subsets: int = 100,
        num_splits: int = 10,
        seed: int = 2020,
    ) -> None:
        super().__init__()
        real.check(extractor)
        self.generated = ImageFeatures(extractor)
        self.real = real
        self.of_train = train
        self.k = k
        self.kid_subset_size = kid_subset_size
        self.kid_num_subsets = kid_num_subsets
        self.num_splits = num_splits
        self.seed = seed
        self._of_real: dict[int, dict[str, float]] = {}  # by number of images

    def update(self, images: Tensor) -> None:
        """Add generated uint8 images `[n, c, h, w]`.

        Raises:
            ConfigError: If images have another dtype or shape, or features are not finite.
        """
        self.real.check(self.generated.extractor, tuple(images.shape[1:]))
        self.generated.update(images)

    def reset(self) -> None:
        """Forget the generated images."""
        super().reset()
        self.generated.reset()  # torchmetrics resets states, but not a metric in an attribute

    def compute(self) -> dict[str, float]:
        """The scores of the images of all ranks."""
        generated, real = self.generated.compute(), self.real
        features = generated.features
        num_images = 0 if features is None else len(features)
        if features is None or num_images <= self.k:
            raise ConfigError(
                f"k: must be less than the number of images ({num_images}), found {self.k}"
            )
        warn_if_rank_deficient(generated.gaussian, what="generated images")
        warn_if_rank_deficient(real.gaussian, what="real images")
        fid = frechet_distance(generated.gaussian, real.gaussian)
        scores = {"fid": fid, "num_images": float(num_images)}
        if real.gaussian.num_samples is not None:
            scores["num_real"] = float(real.gaussian.num_samples)
        if generated.logits is not None:
            splits = min(self.num_splits, num_images)
            score = inception_score(generated.logits, num_splits=splits, seed=self.seed)
            scores |= {"inception_score": score.mean, "inception_score_std": score.std}
        of_real = None if real.features is None else real.features.to(features.device)
        if of_real is not None:
            scores |= self._against_real(features, of_real)
        if self.of_train is not None and self.of_train.features is not None:
            of_train = self.of_train.features.to(features.device)
            scores |= self._against_train(features, of_real, of_train)
        elif of_real is not None:
            scores |= self._real_against_real(of_real, num_images)
        return scores

    def _against_real(self, generated: Tensor, real: Tensor) -> dict[str, float]:
        """The scores that need features of real images."""
        size = min(self.kid_subset_size, len(generated), len(real))
        # All subsets are equal if each holds every image: a spread of 0 would mislead.
        whole = size == len(generated) == len(real)
        num_subsets = 1 if whole else self.kid_num_subsets
        kid = kernel_distance(
            real, generated, subset_size=size, num_subsets=num_subsets, seed=self.seed
        )
        scores = {"kid": kid.mean} if whole else {"kid": kid.mean, "kid_std": kid.std}
        if self.k:
            scores |= precision_recall(real, generated, k=self.k)._asdict()
        return scores

    def _real_against_real(self, real: Tensor, count: int) -> dict[str, float]:
        """Two disjoint random parts of the real images against each other."""
        half = min(count, len(real) // 2)
        if half < 2:  # no covariance
            return {}
        order = self._permutation(len(real))
        return self._real_scores(real[order[:half]], real[order[half : 2 * half]])

    def _real_scores(self, first: Tensor, second: Tensor) -> dict[str, float]:
        """The scores of real images against others, computed once: they never change."""
        count = len(first)
        if count not in self._of_real:
            found = {"fid": _fid(first, second)}
            if count > self.k and len(second) > self.k:
                found |= self._against_real(first, second)
            found.pop("kid_std", None)
            self._of_real[count] = {f"{name}_real": value for name, value in found.items()}
            self._of_real[count]["fid_real_num_images"] = float(count)
        return self._of_real[count]

    def _against_train(
        self, generated: Tensor, real: Tensor | None, train: Tensor
    ) -> dict[str, float]:
        """The scores that reveal copies of training images."""
        # The bias of FID depends on the number of images, so `fid_train` takes as many training
        # images as `fid` has real ones, and `fid_real` as many as `fid` has generated ones.
        order = self._permutation(len(train))
        part = train[order[: len(train) if real is None else len(real)]]
        scores = {"fid_train": _fid(generated, part)}
        queries = {"nearest_train": generated}
        if real is not None:
            scores |= self._real_scores(train[order[: len(generated)]], real)
            queries["nearest_train_real"] = real
        for name, rows in queries.items():
            distances = nearest_distance(rows, train)
            scores[f"{name}_mean"] = distances.mean().item()
            scores[f"{name}_median"] = distances.quantile(0.5).item()
        return scores

    def _permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))


def _fid(first: Tensor, second: Tensor) -> float:
    return frechet_distance(*map(GaussianStatistics.from_features, (first, second)))
