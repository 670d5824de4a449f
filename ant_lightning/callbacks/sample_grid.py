"""A picture of generated images beside real ones, at the end of each validation."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, ClassVar

from ant_lightning.callbacks.base import RunCallback, callback_of, steps_of
from ant_lightning.callbacks.classes import images_by_class
from ant_lightning.callbacks.ema import EMA
from ant_lightning.callbacks.figures import save_figure
from ant_lightning.callbacks.grid_figure import grid_columns, sample_grid
from ant_lightning.callbacks.progress import progress_of, showing_steps
from ant_lightning.data.batch import to_uint8
from ant_lightning.data.module import needed_image_data
from ant_lightning.errors import check_at_least

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

    from ant_lightning.models.module import MultiTaskDiffusion


class SampleGrid(RunCallback):
    """A grid of generated images beside real ones, at the end of each validation.

    Image i has class i modulo the number of classes, on both sides. It has the same noise in every
    epoch, so TensorBoard's slider shows how the same images improve.

    Args:
        num_images: Images on each side; fewer if fewer are held out, or for whole rows.
        columns: Images in a row; by default about a square, with each class in columns of its own
            if there are few enough.
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
        check_at_least(1, num_images=num_images, columns=columns, every_n_epochs=every_n_epochs)
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
                classes = pl_module.num_classes
                dataset = needed_image_data(trainer, "SampleGrid").held_out_images
                # As many as there are real ones to compare with, and without an unfinished row.
                count = min(self.num_images, max(len(dataset), classes))
                columns = self.columns or grid_columns(count, classes)
                count -= count % columns if count > columns else 0
                drawn = progress_of(trainer, "images drawn for the grid", total=count)
                with showing_steps(pl_module, drawn):
                    images = pl_module.sample(range(count))
                    drawn.update(count)
        if not trainer.is_global_zero:
            return
        generated = to_uint8(images).cpu().numpy()
        real = to_uint8(self._real(trainer, pl_module, len(images))).cpu().numpy()
        self.path = save_figure(
            trainer,
            sample_grid(generated, real, columns=columns, caption=_caption(trainer, pl_module)),
            tag="1_samples/grid",
            explain="Left should look like right: "
            + ("the same place has the same class." if classes else "as kinds, not one by one."),
        )

    def _real(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, count: int) -> Tensor:
        """Held-out images with the classes of the generated ones; grey for a class without any."""
        dataset = needed_image_data(trainer, "SampleGrid").held_out_images
        classes = pl_module.num_classes
        chosen: list[int | None] = list(range(min(len(dataset), count)))
        if classes:
            chosen = images_by_class(dataset, count, num_classes=classes)
        images = pl_module.images_of(dataset.load([index or 0 for index in chosen], epoch=None))
        # A class without a real image gets mid-grey (0 in [-1, 1]), not an image of another class.
        images[[index is None for index in chosen]] = 0.0
        return images


def _caption(trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> str:
    """How the images were drawn."""
    ema = callback_of(trainer, EMA)
    parts = [
        f"step {steps_of(trainer, pl_module)}",
        "averaged weights" if ema is not None and ema.num_updates else "live weights",
        pl_module.sampler.brief(),
    ]
    if pl_module.num_classes:
        scale = pl_module.guidance_scale
        parts.append("no guidance" if scale == 1 else f"guidance {scale:g}")
    return ", ".join(parts)
