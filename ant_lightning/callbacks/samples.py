"""Images for people to look at: a grid during validation, files from `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from einops import rearrange
from PIL import Image

from ant_lightning.callbacks.figures import save_figure
from ant_lightning.data.batch import Batch
from ant_lightning.data.module import to_uint8
from ant_lightning.errors import ConfigError
from ant_lightning.plotting import sample_grid

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.modules import MultiTaskDiffusion

__all__ = ["SampleGrid", "SampleWriter"]


class SampleGrid(L.Callback):
    """A grid of generated images beside real ones, at the end of each validation.

    Image i has class i modulo the number of classes, on both sides, and the same noise in every
    epoch, so that a slider over the epochs shows the same images become better.

    Args:
        num_images: Images on each side.
        columns: Images in a row; by default the number of classes, or a square.
        every_n_epochs: Validations between two grids.
    """

    def __init__(
        self, *, num_images: int = 100, columns: int | None = None, every_n_epochs: int = 1
    ) -> None:
        if num_images < 1:
            raise ConfigError(f"SampleGrid.num_images: must be at least 1, found {num_images}")
        if every_n_epochs < 1:
            raise ConfigError(
                f"SampleGrid.every_n_epochs: must be at least 1, found {every_n_epochs}"
            )
        self.num_images = num_images
        self.columns = columns
        self.every_n_epochs = every_n_epochs
        self.path: Path | None = None

    def on_validation_epoch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion
    ) -> None:
        """Draw on rank 0; no collective is involved."""
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.sanity_checking or not due or not trainer.is_global_zero:
            return
        generated = to_uint8(pl_module.sample(range(self.num_images))).cpu().numpy()
        real = to_uint8(self._real(trainer, pl_module)).cpu().numpy()
        classes = pl_module.num_classes
        columns = self.columns or classes or max(1, round(self.num_images**0.5))
        guidance = f", guidance {pl_module.guidance_scale:g}" if classes else ""
        caption = f"step {max(trainer.global_step, pl_module.trained_steps)}, {pl_module.sampler}{guidance}"
        figure = sample_grid(generated, real, columns=min(columns, 16), caption=caption)
        self.path = save_figure(
            trainer,
            figure,
            tag="1_samples/grid",
            explain="Left should look like right: same classes in the same columns.",
        )

    def _real(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> Tensor:
        """Held-out images with the classes of the generated ones."""
        dataset = trainer.datamodule.held_out_images  # type: ignore[attr-defined]
        batch = dataset.load(list(range(min(len(dataset), 10 * self.num_images))), epoch=None)
        if not pl_module.num_classes:
            return pl_module.images_of(Batch(*(part[: self.num_images] for part in batch)))
        by_class = [
            torch.nonzero(batch.labels == c).flatten() for c in range(pl_module.num_classes)
        ]
        chosen = []
        for i in range(self.num_images):
            rows = by_class[i % pl_module.num_classes]
            if len(rows):
                chosen.append(rows[(i // pl_module.num_classes) % len(rows)])
        rows = torch.stack(chosen)
        return pl_module.images_of(Batch(*(part[rows] for part in batch)))


class SampleWriter(L.Callback):
    """Writes the images of `predict` into a folder, one PNG for each index.

    An image is a function of the seed and its index, so that the files do not depend on the batch
    size or on the number of ranks; files that are there already are not drawn again.

    Args:
        num_images: How many, over all ranks.
        batch_size: Images drawn at once.
        folder: Where; by default `samples` in the log folder.
    """

    def __init__(
        self, *, num_images: int = 100, batch_size: int = 100, folder: str | None = None
    ) -> None:
        if num_images < 1 or batch_size < 1:
            raise ConfigError(
                f"samples: num_images and batch_size must be at least 1, found {num_images} and "
                f"{batch_size}"
            )
        self.num_images = num_images
        self.batch_size = batch_size
        self.folder = folder
        self._target = Path()

    def setup(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, stage: str) -> None:  # type: ignore[override]
        """Find out which images are missing."""
        if stage != "predict":
            return
        log_dir = trainer.log_dir or trainer.default_root_dir
        self._target = Path(self.folder or Path(log_dir) / "samples")
        self._target.mkdir(parents=True, exist_ok=True)
        mine = range(trainer.global_rank, self.num_images, trainer.world_size)
        missing = [i for i in mine if not self._file(i).exists()]
        size = self.batch_size
        batches = [missing[i : i + size] for i in range(0, len(missing), size)]
        trainer.datamodule.predict_indices = batches  # type: ignore[attr-defined]

    def on_predict_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: MultiTaskDiffusion,
        outputs: Tensor,
        batch: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write a batch; a file appears whole or not at all."""
        for index, image in zip(batch, to_uint8(outputs).cpu(), strict=True):
            partial = self._file(index).with_suffix(".part")
            pixels = rearrange(image, "c h w -> h w c").squeeze(-1).numpy()
            Image.fromarray(pixels).save(partial, format="png")
            partial.replace(self._file(index))

    def on_predict_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:  # type: ignore[override]
        """Say where the images are."""
        if trainer.is_global_zero:
            print(f"{self.num_images} images are in {self._target}")

    def _file(self, index: int) -> Path:
        return self._target / f"{index:06d}.png"
