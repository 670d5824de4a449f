"""Lightning's checkpoints under manual optimization."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint

if TYPE_CHECKING:
    import lightning as L

__all__ = ["Checkpoints"]


class Checkpoints(ModelCheckpoint):
    """`ModelCheckpoint`, which also saves when training ends, wherever that is.

    A checkpoint holds the weights after the optimizer step. `train_time_interval` has no effect
    under manual optimization: Lightning looks at steps and epochs alone.

    Args:
        at_steps: Optimizer steps after which a checkpoint `step_N.ckpt` is kept besides.
        settings: Everything that `ModelCheckpoint` takes.
    """

    def __init__(self, *, at_steps: list[int] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.at_steps = at_steps or []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Save when it is due, without advice to save the weights before the step."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
            super().on_train_batch_end(*args, **kwargs)
        trainer: L.Trainer = args[0]
        if trainer.global_step in self.at_steps:
            folder = Path(self.dirpath or trainer.default_root_dir)
            trainer.save_checkpoint(folder / f"step_{trainer.global_step}.ckpt")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the steps since the last checkpoint, for instance when the time is up."""
        super().on_train_end(trainer, pl_module)
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            if self.monitor is None or self.monitor in candidates:
                self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
