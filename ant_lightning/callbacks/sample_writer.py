"""Writes the images that `predict` draws."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant_lightning.callbacks.base import RunCallback
from ant_lightning.callbacks.progress import progress_of
from ant_lightning.callbacks.sample_files import NpzSamples, PngSamples
from ant_lightning.callbacks.sample_identity import sample_identity
from ant_lightning.data.batch import to_uint8
from ant_lightning.data.class_map import class_numbers
from ant_lightning.data.module import needed_image_data
from ant_lightning.errors import ConfigError, check_at_least
from ant_lightning.runtime.run_record import run_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lightning as L
    from torch import Tensor

    from ant_lightning.models.module import MultiTaskDiffusion
    from ant_lightning.runtime.progress_display import ProgressDisplay


class SampleWriter(RunCallback):
    """Writes the images of `predict` into a folder, or into one npz file for ADM's evaluator.

    An image is a function of its index and of the settings in `sample_identity`; it does not depend
    on the batch size or the number of ranks. The identity is stored with the images. A later run
    with the same identity draws the missing images. If the identity differs, or existing images
    have none, the run is refused.

    Args:
        num_images: Images over all ranks.
        batch_size: Images drawn at once.
        classes: Numbers or names: image i is of class i modulo their number in this list; by
            default of all classes in turn. The number of classes stands for no class.
        folder: Folder for PNG files; by default `samples` in the log folder.
        npz: File for all images (`arr_0 [n, h, w, c]`, uint8), in place of the folder.

    Raises:
        ConfigError: If a number is below 1, or folder and npz are both given.

    Examples:
        >>> from ant_lightning import SampleWriter
        >>> writer = SampleWriter(num_images=1000, npz="drawn.npz")
        >>> writer.npz  # after `Trainer(callbacks=[writer]).predict(module, data)`
        'drawn.npz'
    """

    def __init__(
        self,
        *,
        num_images: int = 100,
        batch_size: int = 100,
        classes: Sequence[int | str] | None = None,
        folder: str | None = None,
        npz: str | None = None,
    ) -> None:
        check_at_least(1, num_images=num_images, batch_size=batch_size)
        if folder is not None and npz is not None:
            raise ConfigError(f"npz: must be None if a folder is given ({folder}), found {npz}")
        if npz is not None and not npz.endswith(".npz"):
            raise ConfigError(f"npz: must end in .npz, found {npz}")
        super().__init__()
        self.num_images = num_images
        self.batch_size = batch_size
        self.folder = folder
        self.npz = npz
        self.classes = None if classes is None else list(classes)
        if self.classes == []:
            raise ConfigError("classes: must be None or at least one class, found []")
        self._shown: ProgressDisplay | None = None
        self._num_missing = 0
        self._files: PngSamples | None = None  # once existing images are known to be of this run

    def setup(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, stage: str) -> None:
        """Tell the data module how to find the missing images, which needs the loaded weights."""
        # Every command has this callback, also `fit` of an autoencoder, which the base refuses.
        if stage == "predict":
            super().setup(trainer, pl_module, stage)
            self._files = self._shown = None
            data = needed_image_data(trainer, "SampleWriter")
            pl_module.predict_classes = self._numbers(pl_module, data.class_names)
            data.predict_indices = partial(self._missing_batches, trainer, pl_module)

    def _numbers(self, pl_module: MultiTaskDiffusion, names: Sequence[str]) -> list[int] | None:
        """The numbers of the classes, checked against those of the network and of the data."""
        if self.classes is None:
            return None
        if not pl_module.num_classes:
            raise ConfigError(
                "samples.classes: must be left out for a network without classes, found "
                f"{self.classes}"
            )
        num_classes = pl_module.num_classes
        most = max(num_classes - 1, pl_module.null_class or 0)
        return class_numbers(self.classes, names, num_classes=num_classes, most=most)

    def _missing_batches(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion
    ) -> list[list[int]]:
        """The batches of this rank, after checking that existing images have the same identity.

        Lightning calls this after it has loaded a checkpoint, even if no image is missing.
        """
        path = Path(self.npz or self.folder or run_folder(trainer) / "samples")
        files = PngSamples(path) if self.npz is None else NpzSamples(path, self.num_images)
        pl_module.load_initial_weights()
        data = trainer.datamodule  # type: ignore[attr-defined]
        latents = pl_module.latent_space or getattr(data, "latent_space", None)
        if latents is not None and pl_module.first_stage is None:
            raise ConfigError(
                "model.first_stage: needed to decode the sampled latents into images, found None"
            )
        identity = sample_identity(trainer, pl_module)
        try:
            files.check(identity, store=trainer.is_global_zero)
        except OSError as error:
            raise ConfigError(
                f"{files.setting}: must be writable, found {path} ({error.strerror})"
            ) from error
        present = files.present()
        # No rank writes before all have looked: they must divide the same missing images.
        trainer.strategy.barrier()
        self._files = files
        missing = [i for i in range(self.num_images) if i not in present]
        self._num_missing = len(missing)
        mine, size = missing[trainer.global_rank :: trainer.world_size], self.batch_size
        # Lightning refuses a rank without a batch while others have one, and warns if none has.
        return [mine[i : i + size] for i in range(0, len(mine), size)] or [[]]

    def on_predict_start(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Start to count the images."""
        if self._files is not None and self._num_missing:
            done = self.num_images - self._num_missing
            self._shown = progress_of(  # the bar is that of the trainer
                trainer, "images", total=self.num_images, done=done, bar=False
            )
            pl_module.sampling_progress = self._shown.step

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
            if self._shown is not None:
                done = self._shown.done + len(batch) * trainer.world_size
                self._shown.show(min(done, self.num_images), self.num_images)

    def teardown(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, stage: str) -> None:
        """Finish the files, also if no image was missing; print where they are."""
        if stage != "predict":
            return
        trainer.datamodule.predict_indices = None  # type: ignore[attr-defined]
        pl_module.predict_classes = pl_module.sampling_progress = None
        if self._shown is not None:
            self._shown.end()
        if self._files is None:
            return
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            found = len(self._files.present())
            if found >= self.num_images:
                self._files.finish()
            share = "" if found >= self.num_images else f" of {self.num_images}"
            note = "; none was missing, so none was drawn" if not self._num_missing else ""
            print(f"{found}{share} images are in {self._files.path}{note}")
        trainer.strategy.barrier()  # no rank goes on before the file is there

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Reset the data module, so that a later call does not use these indices."""
        data = getattr(trainer, "datamodule", None)
        if data is not None:
            data.predict_indices = None
        pl_module.sampling_progress = None  # type: ignore[assignment]
