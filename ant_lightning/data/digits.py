"""The 1,797 handwritten digits that come with scikit-learn: real data without a download."""

from __future__ import annotations

import torch
from torch import Tensor

from ant_lightning.data.dataset import ImageDataset, TensorImages
from ant_lightning.data.module import ImageDataModule
from ant_lightning.errors import check_range
from ant_lightning.randomness import keyed_generator


def load_digits() -> tuple[Tensor, Tensor]:
    """Load all digits: images `[1797, 1, 8, 8]` float32 in [-1, 1] and labels `[1797]`.

    The data have 17 grey levels, 0 to 16; level v becomes v / 8 - 1.

    Reference:
        Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    from sklearn import datasets  # noqa: PLC0415 - half a second, and only digits need it

    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
    return images, torch.from_numpy(labels).long()


class DigitsData(ImageDataModule):
    """8x8 grey digits of 10 classes, split at random into training and held-out images.

    Args:
        batch_size: Images of one optimizer step, over all ranks.
        num_held_out: Images that are never trained on: validation, test, reference of FID.
        split_seed: Seed of the split, which belongs to the data set and not to the run.
        seed: Order of the training images; by default the seed of the run.

    Raises:
        ConfigError: If a size does not fit the 1,797 images.

    Examples:
        >>> from ant_lightning import DigitsData
        >>> data = DigitsData(batch_size=128, seed=0)
        >>> len(data.train_images), len(data.held_out_images)
        (1437, 360)
        >>> next(iter(data.train_dataloader())).images.shape
        torch.Size([128, 1, 8, 8])
    """

    image_shape = (1, 8, 8)
    num_classes = 10
    identity_settings = ("num_held_out", "split_seed")
    settings_determine_images = True

    def __init__(
        self,
        *,
        batch_size: int = 128,
        num_held_out: int = 360,
        split_seed: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=0, seed=seed)
        check_range(1, 1796, num_held_out=num_held_out)
        self.num_held_out = num_held_out
        self.split_seed = split_seed

    def prepare(self) -> tuple[ImageDataset, ImageDataset]:
        """Training and held-out images."""
        images, labels = load_digits()
        # Not the seed of the run: runs with different seeds must hold out the same images.
        order = torch.randperm(
            len(images), generator=keyed_generator(self.split_seed, "digits split")
        )
        held_out, train = order[: self.num_held_out], order[self.num_held_out :]
        return (
            TensorImages(images[train], labels[train]),
            TensorImages(images[held_out], labels[held_out]),
        )
