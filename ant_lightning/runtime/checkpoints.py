"""Lightning's `ModelCheckpoint`, made safe against kills, full disks and damaged files."""

from __future__ import annotations

import copy
import re
import time
import warnings
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_warn

from ant_lightning.errors import CheckpointWriteError, ConfigError, check_at_least
from ant_lightning.runtime.checkpoint_files import AtomicCheckpointIO, remove_unfinished
from ant_lightning.runtime.stop_signal import StopSignal

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning as L
    from torch import Tensor

# Attributes that `ModelCheckpoint` changes before a file is written; reset if writing fails.
_BOOKKEEPING = (
    "best_k_models",
    "best_model_path",
    "best_model_score",
    "current_score",
    "kth_best_model_path",
    "kth_value",
    "last_model_path",
    "_recent",
)
# Attributes that belong to one run: reset for the next, and returned by child processes.
_OF_RUN = (*_BOOKKEEPING, "_kept_now", "_last_checkpoint_saved", "_last_global_step_saved")


def _check_filename(name: str) -> None:
    """Refuse a bad pattern now; Lightning would only fail at the first checkpoint."""
    try:
        fields = [field for _, field, _, _ in Formatter().parse(name)]
    except ValueError as error:
        raise ConfigError(
            f"filename: must have names in pairs of braces, found {name!r} ({error})"
        ) from error
    if "" in fields or ".." in Path(name).parts or Path(name).is_absolute():
        raise ConfigError(
            f"filename: must name a file below dirpath, as step_{{step}} does, found {name!r}"
        )


class Checkpoints(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, made safe against faults: only complete files count.

    It also saves at the end of training, and when SIGTERM, SIGUSR1 or Ctrl-C ask the run to stop
    (see `StopSignal`). A new file replaces an old one only when it is complete and on the disk. A
    save that fails gives a warning and leaves the earlier checkpoints untouched; if it was the last
    save of the run, the run fails. A checkpoint holds the weights after the optimizer step.

    Args:
        at_steps: Optimizer steps after which an additional checkpoint `step_N.ckpt` is kept.
        keep_last: Without `monitor`, the number of newest checkpoints kept beside `last.ckpt`, in
            case the newest is damaged.
        settings: All arguments of `ModelCheckpoint`. If `filename` already contains the name of a
            value, it is not inserted again: `step_{step}` gives `step_800.ckpt`, not
            `step_step=800.ckpt`.

    Raises:
        ConfigError: If `keep_last` is below 1.
        CheckpointWriteError: When training ends and its last checkpoint cannot be written.

    Examples:
        >>> from ant_lightning import Checkpoints
        >>> checkpoints = Checkpoints(filename="step_{step}", every_n_train_steps=800)
        >>> checkpoints.format_checkpoint_name({"step": 800})
        'step_800.ckpt'
    """

    def __init__(
        self, *, at_steps: list[int] | None = None, keep_last: int = 2, **settings: Any
    ) -> None:
        check_at_least(1, keep_last=keep_last)
        if any(step < 1 for step in at_steps or []):
            raise ConfigError(f"at_steps: must each be at least 1, found {at_steps}")
        _check_filename(settings.get("filename") or "")
        super().__init__(**settings)
        if self.filename and re.search(r"(\w+)[_=]\{\1[}:]", self.filename):
            self.auto_insert_metric_name = False  # the pattern has the name: step_{step}
        self.at_steps = at_steps or []
        self.keep_last = keep_last
        self._recent: list[str] = []
        self._kept_now = ""  # path of the newest file of `at_steps`
        self._failed: CheckpointWriteError | None = None
        self._signal = StopSignal()
        self._found_dirpath: object = None  # folder Lightning chose, if `dirpath` was not given
        # The state before any run, for `setup` of the next one.
        self._first = copy.deepcopy({name: getattr(self, name) for name in _OF_RUN})

    @property
    def state_key(self) -> str:
        """Monitor and mode only: with Lightning's key, a change of intervals loses the state."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def _last(self) -> Path:
        return Path(str(self.dirpath)) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Install `AtomicCheckpointIO`; remove half-written files of a killed run."""
        if stage == "fit" and trainer.global_step == 0:  # a new run: forget the files of the last
            vars(self).update(copy.deepcopy(self._first))
            if self.dirpath == self._found_dirpath:
                self.dirpath = None
        found = self.dirpath is None  # then `super().setup` chooses a folder
        super().setup(trainer, pl_module, stage)
        if found:
            self._found_dirpath = self.dirpath
        # `type`, not `isinstance`: a subclass is the user's own choice.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        cluster = trainer._accelerator_connector.cluster_environment
        if isinstance(cluster, SLURMEnvironment):
            cluster.auto_requeue = False  # it would save amid a step, to another folder
        if stage == "fit" and trainer.is_global_zero:
            remove_unfinished(self._last.parent)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen for signals; continue the list of files of the run that is resumed."""
        super().on_train_start(trainer, pl_module)
        self._signal.listen(trainer)
        self._take_over_last(trainer)
        # If a checkpoint was made at the last step of an epoch, Lightning counts the epoch as
        # completed and still resumes "mid epoch". The next epoch would then start without being
        # counted and without `on_train_epoch_start`.
        loop = trainer.fit_loop
        if loop.restarted_mid_epoch and loop.epoch_progress.current.completed == (
            loop.epoch_progress.current.ready
        ):
            loop.reset_restart_stage()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Save if a step or a time is due; stop if a signal asked for it."""
        # The warning says that the file will hold the weights after the step, which we intend.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if self._is_due_by_time(trainer):
            self._save(trainer)
            self._last_time_checked = time.monotonic()
        # In addition to the intervals; `_remove_checkpoint` spares these files.
        if trainer.global_step in self.at_steps:
            path = self._last.with_name(f"step_{trainer.global_step}{self.FILE_EXTENSION}")
            self._kept_now = str(path)
            self._try(trainer, self._write, trainer, trainer.save_checkpoint, path)
        self._signal.check(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the steps since the last checkpoint, for instance when `max_time` ends the run."""
        self._save(trainer)
        super().on_train_end(trainer, pl_module)
        self._signal.ignore()
        if self._failed is not None:
            raise self._failed

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write `last.ckpt` if a kill prevented it and the resumed run has no step left to make.

        Without a step, `on_train_end` is not called.
        """
        super().on_fit_end(trainer, pl_module)
        is_last = Path(str(trainer.ckpt_path)).name == self._last.name
        if self._take_over_last(trainer) and self.save_last and not is_last:
            self._save(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen in commands that do not train too: Lightning only notes the signal there."""
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn != "fit":
            self._signal.listen(trainer)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the handlers of signals after a command that does not train."""
        super().teardown(trainer, pl_module, stage)
        self._signal.ignore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save the steps since the last checkpoint if a signal ends the run between two steps."""
        self._signal.ignore()
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, SIGTERMException):
            self._save(trainer)
            path = self.last_model_path or self.best_model_path
            if path:  # for the command line
                exception.add_note(f"at step {trainer.global_step}; checkpoint {path}")

    def state_dict(self) -> dict[str, Any]:
        """The state of `ModelCheckpoint`, and the list of the newest files."""
        return {**super().state_dict(), "recent": list(self._recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the list of the newest files if this run uses the same folder."""
        super().load_state_dict(state_dict)
        if self.dirpath == state_dict.get("dirpath"):
            self._recent = list(state_dict.get("recent", []))

    def child_state(self, trainer: L.Trainer) -> dict[str, Any]:
        """In a child process: the files it wrote; Lightning itself returns only the best one."""
        return {name: getattr(self, name) for name in ("dirpath", *_OF_RUN)}

    def load_child_state(self, state: dict[str, Any], pl_module: L.LightningModule) -> None:
        """In the parent: take over the child's list of files."""
        vars(self).update(state)

    def file_exists(self, filepath: str | Path, trainer: L.Trainer) -> bool:
        """Whether a save would overwrite another state.

        A file of `at_steps` from this very step has the same content: it needs no `-v1` beside it.
        """
        return super().file_exists(filepath, trainer) and str(filepath) != self._kept_now

    def _take_over_last(self, trainer: L.Trainer) -> bool:
        """Adopt `last.ckpt` if the run that is resumed saved to this folder; return whether it did.

        Otherwise Lightning would keep that file and write `last-v1.ckpt` beside it.
        """
        resumed = trainer.ckpt_path
        if resumed is None or Path(resumed).resolve().parent != self._last.parent.resolve():
            return False
        self.last_model_path = self.last_model_path or str(self._last)
        return True

    def _is_due_by_time(self, trainer: L.Trainer) -> bool:
        """Whether `train_time_interval` has passed; rank 0 decides for all."""
        if self._train_time_interval is None or self._last_time_checked is None:
            return False
        passed = time.monotonic() - self._last_time_checked
        due = passed >= self._train_time_interval.total_seconds()
        return bool(trainer.strategy.broadcast(due))

    def _save(self, trainer: L.Trainer) -> None:
        """Save now, unless this step was saved already."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None or self.monitor in candidates:
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """Overwrite `step`: an evaluation may have logged an older one."""
        candidates = super()._monitor_candidates(trainer)
        return {**candidates, "step": torch.tensor(trainer.global_step)}

    def _save_topk_checkpoint(
        self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        self._try(trainer, super()._save_topk_checkpoint, trainer, monitor_candidates)

    def _save_last_checkpoint(
        self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        self._try(trainer, super()._save_last_checkpoint, trainer, monitor_candidates)

    def _save_none_monitor_checkpoint(
        self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        """Keep the newest `keep_last`; Lightning keeps one. `save_top_k=-1` still keeps all."""
        path = self._get_metric_interpolated_filepath_name(
            monitor_candidates, trainer, self.best_model_path
        )
        # Before the file is written, because the file contains these attributes.
        self.best_model_path = path
        if self.save_top_k == 1:
            self._recent = [*(each for each in self._recent if each != path), path]
        self._save_checkpoint(trainer, path)
        # Only now: if writing fails, no older file is removed.
        while len(self._recent) > self.keep_last:
            self._remove_checkpoint(trainer, self._recent.pop(0))

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self._write(trainer, super()._save_checkpoint, trainer, filepath)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Never remove files of `at_steps`, even if they are also among the newest or best."""
        kept = {f"step_{step}{self.FILE_EXTENSION}" for step in self.at_steps}
        if Path(filepath).name not in kept:
            super()._remove_checkpoint(trainer, filepath)

    def _write(self, trainer: L.Trainer, write: Callable[..., None], *args: Any) -> None:
        """Write a file; if rank 0 fails, raise on every rank.

        Otherwise the other ranks would train on while rank 0 handles the error.
        """
        error: CheckpointWriteError | None = None
        with self._signal.held():
            try:
                write(*args)
            # Only rank 0 writes; the others already wait in this barrier of `save_checkpoint`.
            except CheckpointWriteError as failed:
                trainer.strategy.barrier("Trainer.save_checkpoint")
                error = failed
            if trainer.world_size > 1:
                message = trainer.strategy.broadcast(str(error) if error else None)
                error = error or (CheckpointWriteError(message) if message else None)
        if error is not None:
            raise error

    def _try(self, trainer: L.Trainer, save: Callable[..., None], *args: Any) -> None:
        """Save; if the file cannot be written, warn, restore the bookkeeping and train on."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined] # it must leave no files
            return
        # `ModelCheckpoint` lists a file before it is written; a failed one must not stay listed.
        before = {name: copy.copy(getattr(self, name)) for name in _BOOKKEEPING}
        try:
            save(*args)
            self._failed = None
        except CheckpointWriteError as error:
            vars(self).update(before)
            self._failed = error
            rank_zero_warn(
                f"checkpoint: {error}; training goes on, the earlier checkpoints are kept, and "
                "the next save tries again"
            )
