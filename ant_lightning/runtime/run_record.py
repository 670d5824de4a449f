"""What a run records in its folder: its settings as YAML, and the versions of its loggers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from ant_lightning.files.atomic import write_text
from ant_lightning.runtime.changed_settings import flat_settings
from ant_lightning.runtime.loggers import send_files, send_settings
from ant_lightning.runtime.run_files import RUN_MARK, numbered, remove_empty_run
from ant_lightning.tasks.time_axis import NoiseCells

if TYPE_CHECKING:
    from collections.abc import Mapping


class RunRecord(L.Callback):
    """Writes the settings of a command into the run's folder.

    Training writes `config.yaml` once every check has passed, before its first step. Other commands
    write `validate.yaml`, `diagnose.yaml` and so on beside it. A file with different content is
    never overwritten: the new one gets a number (`config_1.yaml`). A run that fails before its
    first step leaves nothing.

    Args:
        folder: The run's folder.
        command: `fit`, `validate`, `diagnose`, `test` or `predict`.
        text: The settings as YAML.
        settings: The settings that decide what is trained, as plain values; stored in every
            checkpoint.
        made: The folders that were made for this run; see `remove_empty_run`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        command: str,
        text: str,
        settings: Mapping[str, Any],
        made: tuple[Path, ...],
    ) -> None:
        self.run_folder = folder
        self.settings = dict(settings)
        self._command = command
        self._text = text
        self._made = made
        self._started = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Use rank 0's folder: a rank that started later may have chosen the next free number."""
        self.run_folder = trainer.strategy.broadcast(self.run_folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write `config.yaml` and, for a later resume, the version of each logger."""
        self._started = True
        if trainer.is_global_zero:
            self._write("config")
            versions = {type(logger).__name__: logger.version for logger in trainer.loggers}
            write_text(self.run_folder / RUN_MARK, json.dumps(versions, default=str) + "\n")
            send_settings(trainer.loggers, flat_settings(self.settings))
            send_files(trainer.loggers, self.run_folder)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the settings of an evaluation; validations inside `fit` have `config.yaml`."""
        if trainer.state.fn != "fit":
            self._started = True
            if trainer.is_global_zero:
                self._write(self._command)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Send what the other callbacks have written to loggers that keep files elsewhere."""
        if trainer.is_global_zero and self._started:
            send_files(trainer.loggers, self.run_folder)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The same after an evaluation."""
        if stage != "fit":
            self.on_fit_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the settings, the noise axis, and the path from the checkpoint to the folder."""
        state = checkpoint.setdefault("ant_lightning", {})
        state["settings"] = self.settings
        process = getattr(pl_module, "process", None)  # an autoencoder has none
        if process is not None:
            state["noise_cells"] = NoiseCells.of(process).state()  # for `cli.report`
        beside = getattr(trainer.checkpoint_callback, "dirpath", None)
        if beside is not None and "://" not in str(beside):
            # Relative, so that a run can be moved together with its checkpoints.
            state["run_folder"] = os.path.relpath(self.run_folder, beside)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Remove the folder of a run that never started."""
        if not self._started:
            for logger in trainer.loggers:  # a TensorBoard thread may still be writing
                logger.finalize("failed")
            if not getattr(rank_zero_only, "rank", 0):
                remove_empty_run(self._made)

    def _write(self, name: str) -> None:
        # A resume with the same settings adds no file; other settings get the next number.
        newest, free = numbered(self.run_folder, name)
        if newest is None or newest.read_bytes() != self._text.encode():
            write_text(free, self._text)


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of this run; call it on every rank, because it may broadcast.

    See `local_run_folder`.
    """
    folder: Path = trainer.strategy.broadcast(local_run_folder(trainer))
    return folder


def local_run_folder(trainer: L.Trainer) -> Path:
    """The folder of this run, as this rank knows it.

    On the command line it is the folder of `RunRecord`. From Python it is that of the first logger,
    `<save_dir>/<name>/<version>` if it keeps its files elsewhere; without a logger, the trainer's
    `default_root_dir`, which is then to be a folder for each run.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunRecord):
            return callback.run_folder
    logger = trainer.logger
    if logger is None:
        return Path(trainer.default_root_dir)
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return Path(logger.log_dir)
    # As Lightning names the folder of the checkpoints.
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version
