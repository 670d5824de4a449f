"""Mean, covariance and features of a set of images, of which each rank has a share."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ant_lightning.errors import ConfigError
from ant_lightning.generation.extractor import FeatureExtractor, check_images
from ant_lightning.generation.frechet import GaussianStatistics
from ant_lightning.generation.statistics import ImageStatistics


class ImageFeatures(Metric):
    """Mean, covariance and features of a set of images, from one pass through an extractor.

    FID needs the count and the sums of features and of their outer products: states (the sums in
    float64) that are summed over ranks. KID, precision, recall and the nearest training image need
    the features themselves, which are gathered. Give rank r of N the images r, r + N, r + 2 N, ...:
    then the features are in the order of the images, and no score depends on the number of ranks.

    Args:
        extractor: The network; images are moved to its device.
        keep_features: Whether to keep features and logits. Without them memory does not grow with
            the number of images.

    Examples:
        >>> import torch
        >>> from ant_lightning import ImageFeatures, ModuleFeatures
        >>> pixels = ModuleFeatures(torch.nn.Identity(), num_features=1, name="pixels")
        >>> images = ImageFeatures(pixels)
        >>> images.update(torch.tensor([[[[1]]], [[[3]]]], dtype=torch.uint8))
        >>> images.compute().gaussian.mean
        tensor([2.], dtype=torch.float64)
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    outer: Tensor
    features: list[Tensor]
    logits: list[Tensor]
    positions: list[Tensor]

    def __init__(self, extractor: FeatureExtractor, *, keep_features: bool = True) -> None:
        super().__init__()
        size = extractor.num_features
        self.extractor = extractor
        self.keep_features = keep_features
        self.image_shape: tuple[int, int, int] | None = None
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("features", "logits", "positions"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: Tensor) -> None:
        """Add uint8 images `[n, c, h, w]`.

        Raises:
            ConfigError: If images have another dtype or shape, or features are not finite.
        """
        check_images(images)
        # Validation in half precision would autocast the extractor, and the scores would change.
        with torch.autocast(self.device.type, enabled=False):
            features, logits = self.extractor.extract(images.to(self.device))
        features = features.float()
        if features.shape != (len(images), len(self.total)):
            raise ConfigError(
                f"extractor: {self.extractor.name} must give features of shape "
                f"{[len(images), len(self.total)]}, found {list(features.shape)}"
            )
        start = int(self.count)
        bad = (~features.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise ConfigError(
                f"extractor: {self.extractor.name} must give finite features, found NaN or an "
                f"infinity for image {start + int(bad[0])}"
            )
        self.image_shape = (images.shape[1], images.shape[2], images.shape[3])
        exact = features.double()
        self.count += len(images)
        self.total += exact.sum(0)
        self.outer.addmm_(exact.T, exact)
        if self.keep_features:
            self.features.append(features)
            self.positions.append(torch.arange(start, start + len(images), device=self.device))
            if logits is not None:
                self.logits.append(logits.float())

    def compute(self) -> ImageStatistics:
        """The statistics of the images of all ranks.

        Raises:
            ConfigError: If there are fewer than two images.
        """
        features = logits = None
        if self.keep_features and int(self.count):
            # After the gather come rank 0's images, then rank 1's, ... A position counts within
            # a rank, so a stable sort interleaves them: image 0 of rank 0, image 0 of rank 1, ...,
            # image 1 of rank 0, ...: the order of the indices.
            order = dim_zero_cat(self.positions).argsort(stable=True)
            features = dim_zero_cat(self.features)[order]
            logits = dim_zero_cat(self.logits)[order] if len(self.logits) else None
        return ImageStatistics(
            GaussianStatistics.from_sums(int(self.count), self.total, self.outer),
            features,
            logits=logits,
            extractor=self.extractor.name,
            image_shape=self.image_shape,
        )
