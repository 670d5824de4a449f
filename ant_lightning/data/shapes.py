"""Coloured shapes, drawn on demand: labelled images of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ant_lightning.data.batch import Batch
from ant_lightning.data.dataset import ImageDataset
from ant_lightning.data.module import ImageDataModule
from ant_lightning.errors import check_at_least, check_range
from ant_lightning.randomness import keyed_generator

KINDS = ("disc", "square", "triangle", "ring", "cross", "star")


def draw_shapes(numbers: Tensor, *, labels: Tensor, num_classes: int, image_size: int) -> Tensor:
    """Draw one shape in each image, `[b, 3, s, s]` float32 in [-1, 1].

    Class c has the shape `KINDS[c % 6]` and the hue `c // 6` out of `ceil(num_classes / 6)` hues.
    The same numbers give the same picture at every size: only edges, one pixel wide, differ.

    Args:
        numbers: `[b, 8]` in [0, 1): position x and y, size, angle, hue within the class's range of
            hues, brightness, hue of the background, brightness of the background.
        labels: Class of each image, `[b]`.
        num_classes: Number of classes.
        image_size: `s`, in pixels.
    """
    axis = (torch.arange(image_size) + 0.5) / image_size * 2 - 1  # centres of the pixels
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    size = (0.3 + 0.3 * numbers[:, 2])[:, None, None]
    centre = (numbers[:, :2] * 2 - 1) * 0.35
    angle = (numbers[:, 3] * 2 * math.pi)[:, None, None]
    x, y = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    # (u, v): coordinates around the shape's centre, turned with it, in which its radius is 1.
    u = (x * angle.cos() + y * angle.sin()) / size
    v = (y * angle.cos() - x * angle.sin()) / size
    distance = _distances(u, v, labels % len(KINDS)) * size
    # Anti-aliasing: the share of a pixel that lies inside, as if the edge were straight. A pixel is
    # 2 / image_size wide, so the product is the distance in pixels.
    cover = (0.5 - distance * image_size / 2).clamp(0, 1)[:, None]
    num_hues = -(-num_classes // len(KINDS))
    # Classes of the same shape divide the circle of hues among them; 0.6 leaves gaps in between.
    hue = (labels // len(KINDS) + 0.6 * numbers[:, 4]) / num_hues
    shape = _colours(hue, 0.9, 0.6 + 0.4 * numbers[:, 5])
    ground = _colours(numbers[:, 6], 0.3, 0.1 + 0.3 * numbers[:, 7])
    images: Tensor = (cover * shape + (1 - cover) * ground) * 2 - 1
    return images


class ShapesData(ImageDataModule):
    """Discs, squares, triangles, rings, crosses and stars in colours: labels without a download.

    Args:
        image_size: Side in pixels, up to 256.
        num_images: Training images.
        num_held_out: Further images, for validation and metrics.
        num_classes: Number of classes: six shapes, in as many hues as that takes.
        batch_size: Images of one optimizer step, over all ranks.
        shapes_seed: Seed of the images; part of the data set, so separate from the run's seed.
        num_workers: Loading processes of each rank.
        seed: Order of the training images; by default the seed of the run.

    Raises:
        ConfigError: If a number is out of its range.

    Examples:
        >>> from ant_lightning import ShapesData
        >>> data = ShapesData(image_size=16, num_classes=12, seed=0)
        >>> batch = data.train_images.load([0, 13], epoch=None)  # a disc, a square of another hue
        >>> batch.images.shape, batch.labels.tolist()
        (torch.Size([2, 3, 16, 16]), [0, 1])
    """

    identity_settings = ("num_images", "num_held_out", "shapes_seed")
    settings_determine_images = True

    def __init__(
        self,
        *,
        image_size: int = 32,
        num_images: int = 50000,
        num_held_out: int = 1000,
        num_classes: int = 12,
        batch_size: int = 128,
        shapes_seed: int = 0,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_range(4, 256, image_size=image_size)
        check_at_least(1, num_images=num_images, num_held_out=num_held_out, num_classes=num_classes)
        self.image_shape = (3, image_size, image_size)
        self.num_classes = num_classes
        self.num_images = num_images
        self.num_held_out = num_held_out
        self.shapes_seed = shapes_seed

    def prepare(self) -> tuple[ImageDataset, ImageDataset]:
        """Training images, and held-out images whose numbers follow theirs."""
        return (
            _Shapes(self, first=0, count=self.num_images),
            _Shapes(self, first=self.num_images, count=self.num_held_out),
        )


class _Shapes(ImageDataset):
    """Images that are functions of (seed, number); image i of a part has the number `first + i`."""

    def __init__(self, data: ShapesData, *, first: int, count: int) -> None:
        self._seed, self._num_classes = data.shapes_seed, data.num_classes
        self._size = data.image_shape[1]
        self._first, self._count = first, count

    def __len__(self) -> int:
        return self._count

    def load(self, indices: list[int], *, epoch: int | None) -> Batch:
        """Draw the images at `indices`; nothing is augmented."""
        # A generator for each image, so that an image does not depend on its batch.
        rows = torch.tensor(indices)
        labels = (rows + self._first) % self._num_classes
        generators = (keyed_generator(self._seed, "shape", self._first + i) for i in indices)
        numbers = torch.stack([torch.rand(8, generator=generator) for generator in generators])
        images = draw_shapes(
            numbers, labels=labels, num_classes=self._num_classes, image_size=self._size
        )
        return Batch(images, labels, rows)


def _distances(u: Tensor, v: Tensor, kinds: Tensor) -> Tensor:
    """Approximate signed distance to the edge of each image's shape; negative inside.

    The maximum of two distances is that of the intersection, the minimum that of the union.
    """
    radius = (u.square() + v.square()).sqrt()
    box = torch.maximum(u.abs(), v.abs())
    small = torch.minimum(u.abs(), v.abs())
    # Three half-planes at distance 0.5 from the centre: a triangle with its corners at radius 1.
    half, root = 0.5, math.sqrt(3) / 2
    triangle = torch.stack([v - half, root * u - half * v - half, -root * u - half * v - half])
    # A square turned by 45 degrees; with the upright one it makes an eight-pointed star.
    turned = torch.maximum((u + v).abs(), (u - v).abs()) / math.sqrt(2)
    every = [  # in the order of KINDS
        radius - 1,
        box - 0.85,
        triangle.amax(0),
        (radius - 0.75).abs() - 0.25,
        torch.maximum(box - 1, small - 0.3),
        torch.minimum(box, turned) - 0.75,
    ]
    rows = torch.arange(len(kinds))
    return torch.stack(every)[kinds, rows]


def _colours(hue: Tensor, saturation: float, value: Tensor) -> Tensor:
    """Convert hue (1 is a full turn), saturation and value to RGB `[b, 3, 1, 1]` in [0, 1]."""
    thirds = torch.tensor([0.0, 2 / 3, 1 / 3])
    ramp = (((hue[:, None] + thirds) % 1) * 6 - 3).abs().sub(1).clamp(0, 1)
    return (value[:, None] * (1 - saturation * (1 - ramp)))[..., None, None]
