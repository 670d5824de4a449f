"""Unlimited digits from a Gaussian mixture: data whose exact denoiser is known."""

from __future__ import annotations

from functools import lru_cache

import torch

from ant_lightning.data.batch import Batch
from ant_lightning.data.dataset import ImageDataset
from ant_lightning.data.digits import load_digits
from ant_lightning.data.module import ImageDataModule
from ant_lightning.diffusion.mixture import GaussianMixture
from ant_lightning.errors import check_above, check_at_least, check_range
from ant_lightning.randomness import keyed_generator


@lru_cache(maxsize=1)
def digits_mixture(num_components: int = 40, regularization: float = 3e-3) -> GaussianMixture:
    """Fit a mixture to the 64 pixels of all 1,797 real digits, in about [-1, 1].

    The fit is expectation maximisation that starts from k-means with a fixed seed;
    `regularization` is added to the variances. The most recent fit is cached.
    """
    from sklearn import mixture  # noqa: PLC0415 - half a second, and only digits need it

    images, _ = load_digits()
    fit = mixture.GaussianMixture(
        num_components, reg_covar=regularization, random_state=0, max_iter=200
    ).fit(images.flatten(1).double().numpy())
    weights, means, covariances = (
        torch.from_numpy(each) for each in (fit.weights_, fit.means_, fit.covariances_)
    )
    # Rounding leaves the sum of the weights and the symmetry of the covariances off by a last bit.
    return GaussianMixture(weights / weights.sum(), means, (covariances + covariances.mT) / 2)


class DigitsMixtureData(ImageDataModule):
    """8x8 grey images from a full-covariance Gaussian mixture that was fitted to the real digits.

    No image is seen twice in training, so nothing can be memorised. `E[eps | x_t]` is known in
    closed form (`mixture.denoise`), so `ExcessRisk` can measure how far a model's loss is above the
    lowest possible loss. A few pixels lie outside [-1, 1], so a model of them has
    `Sampling(clip_denoised=False)`. There are no labels.

    Args:
        batch_size: Images of one optimizer step, over all ranks.
        num_images: Images of an epoch; every epoch has new ones.
        num_held_out: Further images, for validation and metrics.
        num_components: Components of the mixture.
        regularization: Added to the variance of each pixel.
        images_seed: Seed of the images; part of the data set, so separate from the run's seed.
        num_workers: Loading processes of each rank.
        seed: Order of the training images; by default the seed of the run.

    Raises:
        ConfigError: If a number is out of its range.

    Examples:
        >>> from ant_lightning import DigitsMixtureData
        >>> data = DigitsMixtureData(num_images=100, num_held_out=10, num_components=1, seed=0)
        >>> first, second = (data.train_images.load([0], epoch=epoch).images for epoch in (0, 1))
        >>> first.shape, bool((first == second).any())
        (torch.Size([1, 1, 8, 8]), False)
        >>> data.mixture.means.shape
        torch.Size([1, 64])
    """

    image_shape = (1, 8, 8)
    num_classes = 0
    identity_settings = (
        "num_images",
        "num_held_out",
        "num_components",
        "regularization",
        "images_seed",
    )
    settings_determine_images = True

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_images: int = 50000,
        num_held_out: int = 20000,
        num_components: int = 40,
        regularization: float = 3e-3,
        images_seed: int = 0,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_at_least(1, num_images=num_images, num_held_out=num_held_out)
        check_range(1, 400, num_components=num_components)
        check_above(0, regularization=regularization)
        self.num_images = num_images
        self.num_held_out = num_held_out
        self.num_components = num_components
        self.regularization = regularization
        self.images_seed = images_seed

    @property
    def mixture(self) -> GaussianMixture:
        """The distribution of the images, flattened."""
        return digits_mixture(self.num_components, self.regularization)

    def prepare(self) -> tuple[ImageDataset, ImageDataset]:
        """Training images, and others from the same distribution."""
        return (
            _Draws(self, "mixture train", self.num_images),
            _Draws(self, "mixture held out", self.num_held_out),
        )


class _Draws(ImageDataset):
    """Images that are functions of (seed, epoch, index): every epoch has new ones."""

    def __init__(self, data: DigitsMixtureData, stream: str, count: int) -> None:
        self._mixture, self._seed = data.mixture, data.images_seed
        self._stream, self._count = stream, count
        self._epoch: int | None = None
        self._images = torch.empty(0)

    def __len__(self) -> int:
        return self._count

    def load(self, indices: list[int], *, epoch: int | None) -> Batch:
        """Load the images at `indices`; `epoch=None` gives those of epoch 0."""
        epoch = epoch or 0
        # A whole epoch is drawn at once, which takes a fraction of a second, and kept until another
        # epoch is asked for. An image is thus the same in every batch and loading process.
        if self._epoch != epoch:
            generator = keyed_generator(self._seed, self._stream, epoch)
            samples, _ = self._mixture.draw(self._count, generator=generator)
            self._images, self._epoch = samples.float().view(-1, 1, 8, 8), epoch
        rows = torch.tensor(indices)
        return Batch(self._images[rows], torch.zeros_like(rows), rows)
