"""Images for people to look at: a grid during validation, files from `predict`."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar

from ant_lightning.callbacks.base import RunCallback, steps_of
from ant_lightning.callbacks.classes import images_by_class
from ant_lightning.callbacks.figures import save_figure
from ant_lightning.callbacks.image_figures import sample_grid
from ant_lightning.callbacks.sample_files import NpzSamples, PngSamples, SampleFiles
from ant_lightning.callbacks.sample_identity import sample_identity
from ant_lightning.data.batch import to_uint8
from ant_lightning.data.module import needed_image_data
from ant_lightning.errors import ConfigError
from ant_lightning.models.latents import load_initial_weights
from ant_lightning.runtime.run_record import run_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning as L
    from torch import Tensor

    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["SampleGrid", "SampleWriter"]


class SampleGrid(RunCallback):
    """A grid of generated images beside real ones, at the end of each validation.

    Image i has class i modulo the number of classes, on both sides, and the same noise in every
    epoch, so that a slider over the epochs shows the same images become better.

    Args:
        num_images: Images on each side.
        columns: Images in a row; by default the number of classes, or a square.
        every_n_epochs: Validations between two grids.
    """

    path: Path | None
    of_run: ClassVar = {"path": NoneType}

    def __init__(
        self, *, num_images: int = 100, columns: int | None = None, every_n_epochs: int = 1
    ) -> None:
        if num_images < 1:
            raise ConfigError(f"SampleGrid.num_images: must be at least 1, found {num_images}")
        if every_n_epochs < 1:
            raise ConfigError(
                f"SampleGrid.every_n_epochs: must be at least 1, found {every_n_epochs}"
            )
        super().__init__()
        self.num_images = num_images
        self.columns = columns
        self.every_n_epochs = every_n_epochs

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Draw on rank 0; no collective is involved."""
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.sanity_checking or not due or not trainer.is_global_zero:
            return
        generated = to_uint8(pl_module.sample(range(self.num_images))).cpu().numpy()
        real = to_uint8(self._real(trainer, pl_module)).cpu().numpy()
        classes = pl_module.num_classes
        columns = self.columns or classes or max(1, round(self.num_images**0.5))
        guidance = f", guidance {pl_module.guidance_scale:g}" if classes else ""
        caption = f"step {steps_of(trainer, pl_module)}, {pl_module.sampler}{guidance}"
        figure = sample_grid(generated, real, columns=min(columns, 16), caption=caption)
        self.path = save_figure(
            trainer,
            figure,
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
        places = [place for place, index in enumerate(chosen) if index is not None]
        indices = [index for index in chosen if index is not None]
        images = pl_module.images_of(dataset.load(indices or [0], epoch=None))
        grid = images.new_zeros(len(chosen), *images.shape[1:])
        grid[places] = images[: len(places)]
        return grid


class SampleWriter(RunCallback):
    """Writes the images of `predict` into a folder, or into one npz file for ADM's evaluator.

    An image is a function of its index and of what `sample_identity` names, so that what is
    written does not depend on the batch size or on the number of ranks. The identity is stored
    with the images: a run of the same one draws what is missing, any other is refused, and so are
    images without an identity.

    Args:
        num_images: How many, over all ranks.
        batch_size: Images drawn at once.
        folder: For PNG files; by default `samples` in the log folder.
        npz: A file for all images (`arr_0 [n, h, w, c]`, uint8), in place of the folder.

    Raises:
        ConfigError: If a number is below 1, or folder and npz are both given.
    """

    def __init__(
        self,
        *,
        num_images: int = 100,
        batch_size: int = 100,
        folder: str | None = None,
        npz: str | None = None,
    ) -> None:
        if num_images < 1 or batch_size < 1:
            raise ConfigError(
                f"samples: num_images and batch_size must be at least 1, found {num_images} and "
                f"{batch_size}"
            )
        if folder is not None and npz is not None:
            raise ConfigError(f"samples: give folder or npz, not both, found {folder} and {npz}")
        if npz is not None and not npz.endswith(".npz"):
            raise ConfigError(f"samples.npz: must end in .npz, found {npz}")
        super().__init__()
        self.num_images = num_images
        self.batch_size = batch_size
        self.folder = folder
        self.npz = npz
        self._files: SampleFiles | None = None
        self._begun = False

    def setup(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, stage: str) -> None:
        """Prepare the target; which images are missing is known once the weights are loaded."""
        if stage != "predict":  # every run has this callback, also that of an autoencoder
            return
        super().setup(trainer, pl_module, stage)
        self._begun = False
        data = needed_image_data(trainer, "SampleWriter")
        target = Path(self.npz or self.folder or run_folder(trainer) / "samples")
        with _refused(self._setting, target):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._files = (
                PngSamples(target)
                if self.npz is None
                else NpzSamples(target, num_images=self.num_images, rank=trainer.global_rank)
            )
        data.predict_indices = lambda: self._begin(trainer, pl_module)

    def _begin(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> list[list[int]]:
        """The batches of this rank, after checking that existing images have the same identity.

        Lightning calls this after it has loaded a checkpoint, even if no image is missing.
        """
        files = self._files
        assert files is not None
        load_initial_weights(pl_module)
        data = trainer.datamodule  # type: ignore[attr-defined]
        latents = pl_module.latent_space or getattr(data, "latent_space", None)
        if latents is not None and pl_module.first_stage is None:
            raise ConfigError(
                "model.first_stage: needed to decode the sampled latents into images, found null"
            )
        identity = sample_identity(trainer, pl_module)
        with _refused(self._setting, files.path):
            files.claim(identity, write=trainer.is_global_zero)
        present = files.present()
        # All ranks look before any writes, or they would share what is missing differently.
        trainer.strategy.barrier()
        self._begun = True
        missing = [i for i in range(self.num_images) if i not in present]
        mine, size = missing[trainer.global_rank :: trainer.world_size], self.batch_size
        # Lightning refuses a rank without a batch while others have one, and warns if none has.
        return [mine[i : i + size] for i in range(0, len(mine), size)] or [[]]

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: MultiTaskDiffusion,
        outputs: Tensor,
        batch: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write a batch."""
        if self._files is not None and batch:
            self._files.write(batch, to_uint8(outputs).cpu())

    def teardown(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, stage: str) -> None:
        """Join the ranks' parts, also when nothing was missing; say where the images are."""
        if stage != "predict":
            return
        trainer.datamodule.predict_indices = None  # type: ignore[attr-defined]
        if self._files is None or not self._begun:
            return
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            found = len(self._files.present())
            if found >= self.num_images:
                self._files.finish()
                print(f"{found} images are in {self._files.path}")
            else:
                print(f"{found} of {self.num_images} images are in {self._files.path}")
        trainer.strategy.barrier()  # when a rank goes on, the file is there

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Reset the data module, so that a later call does not use these indices."""
        data = getattr(trainer, "datamodule", None)
        if data is not None:
            data.predict_indices = None

    @property
    def _setting(self) -> str:
        return "samples.folder" if self.npz is None else "samples.npz"


@contextmanager
def _refused(setting: str, target: Path) -> Iterator[None]:
    """Turn an `OSError` into an error that names the setting."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{setting}: must be writable, found {target} ({error.strerror})"
        ) from error
