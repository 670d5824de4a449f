"""A picture of generated images beside real ones, at the end of each validation."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from einops import rearrange
from matplotlib.figure import Figure

from ant_lightning.callbacks.base import RunCallback, steps_of
from ant_lightning.callbacks.classes import images_by_class
from ant_lightning.callbacks.figures import save_figure
from ant_lightning.data.batch import to_uint8
from ant_lightning.data.module import needed_image_data
from ant_lightning.errors import check_at_least

if TYPE_CHECKING:
    import lightning as L
    from numpy.typing import NDArray
    from torch import Tensor

    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["SampleGrid"]


class SampleGrid(RunCallback):
    """A grid of generated images beside real ones, at the end of each validation.

    Image i has class i modulo the number of classes, on both sides. It has the same noise in every
    epoch, so TensorBoard's slider shows how the same images improve.

    Args:
        num_images: Images on each side.
        columns: Images in a row; by default the number of classes, or a square.
        every_n_epochs: Validations between two grids.

    Raises:
        ConfigError: If a number is below 1.

    Examples:
        >>> from ant_lightning import SampleGrid
        >>> grid = SampleGrid(num_images=64)  # for `Trainer(callbacks=[grid])`
        >>> print(grid.path)  # of the last picture
        None
    """

    path: Path | None
    run_state: ClassVar = {"path": NoneType}

    def __init__(
        self, *, num_images: int = 100, columns: int | None = None, every_n_epochs: int = 1
    ) -> None:
        check_at_least(1, num_images=num_images, every_n_epochs=every_n_epochs)
        super().__init__()
        self.num_images = num_images
        self.columns = columns
        self.every_n_epochs = every_n_epochs

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Draw on rank 0; the others only help a sharded backbone."""
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.sanity_checking or not due:
            return
        with pl_module.uneven_calls():
            if trainer.is_global_zero:
                images = pl_module.sample(range(self.num_images))
        if not trainer.is_global_zero:
            return
        generated = to_uint8(images).cpu().numpy()
        real = to_uint8(self._real(trainer, pl_module)).cpu().numpy()
        classes = pl_module.num_classes
        columns = self.columns or classes or max(1, round(self.num_images**0.5))
        guidance = f", guidance {pl_module.guidance_scale:g}" if classes else ""
        caption = f"step {steps_of(trainer, pl_module)}, {pl_module.sampler}{guidance}"
        self.path = save_figure(
            trainer,
            sample_grid(generated, real, columns=min(columns, 16), caption=caption),
            tag="1_samples/grid",
            explain="Left should look like right: same classes in the same columns.",
        )

    def _real(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> Tensor:
        """Held-out images with the classes of the generated ones; grey for a class without any."""
        dataset = needed_image_data(trainer, "SampleGrid").held_out_images
        classes = pl_module.num_classes
        chosen: list[int | None] = list(range(min(len(dataset), self.num_images)))
        if classes:
            chosen = images_by_class(dataset, self.num_images, num_classes=classes)
        images = pl_module.images_of(dataset.load([index or 0 for index in chosen], epoch=None))
        # A class without a real image gets mid-grey (0 in [-1, 1]), not an image of another class.
        images[[index is None for index in chosen]] = 0.0
        return images


def sample_grid(
    generated: NDArray[np.uint8], real: NDArray[np.uint8], *, columns: int, caption: str
) -> Figure:
    """Generated images beside real ones, both uint8 `[n, c, h, w]`."""
    figure = Figure(figsize=(9, 4.9), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, images, title in zip(axes, (generated, real), ("generated", "real"), strict=True):
        axis.imshow(
            image_grid(images, columns=columns),
            cmap="gray",
            vmin=0,
            vmax=255,
            interpolation="nearest",
        )
        axis.set_title(title)
        axis.axis("off")
    figure.suptitle(caption, fontsize=10)
    return figure


def image_grid(images: NDArray[np.uint8], *, columns: int) -> NDArray[np.uint8]:
    """Images `[n, c, h, w]` as one picture `[rows (h + 1), columns (w + 1), c]`, row by row."""
    missing = -len(images) % columns
    # One white pixel below and to the right of each image separates it from the next.
    padded = np.pad(images, ((0, missing), (0, 0), (0, 1), (0, 1)), constant_values=255)
    grid: NDArray[np.uint8] = rearrange(padded, "(r k) c h w -> (r h) (k w) c", k=columns)
    return grid
