"""What a training step costs: time and memory, into a file."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch

from ant_lightning.callbacks.base import RunCallback
from ant_lightning.callbacks.figures import log_folder
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["StepCost"]


class StepCost(RunCallback):
    """Writes `step_cost.json` into the log folder when training ends.

    It has `iterations_per_second` (of the mean over steps, since methods that refresh now and
    then have two kinds of step), `median_step_seconds`, `num_steps` timed and `peak_memory_gb`: the
    most that PyTorch had allocated on the GPU, or without one the largest resident size of the
    process, imports included. Loading of data and validation do not count. Times are null where
    no step was left to be timed.

    Args:
        skip_steps: First steps that are not timed.

    Raises:
        ConfigError: If `skip_steps` is below 0.
    """

    _seconds: list[float]
    module_type = L.LightningModule
    of_run: ClassVar = {"_seconds": list}

    def __init__(self, *, skip_steps: int = 10) -> None:
        if skip_steps < 0:
            raise ConfigError(f"StepCost.skip_steps: must be 0 or more, found {skip_steps}")
        super().__init__()
        self.skip_steps = skip_steps
        self._start = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        _wait(trainer)
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        _wait(trainer)
        self._seconds.append(time.perf_counter() - self._start)

    def on_train_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Write what was seen."""
        if not trainer.is_global_zero:
            return
        timed = self._seconds[self.skip_steps :]
        path = log_folder(trainer) / "step_cost.json"
        if not timed and path.exists():
            return  # resumed where nothing was left to do: the file is of the steps before
        device = pl_module.device
        on_gpu = device.type == "cuda"
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(device)
        else:  # in bytes on macOS, in KiB elsewhere
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak *= 1 if sys.platform == "darwin" else 1024
        row = {
            "iterations_per_second": len(timed) / sum(timed) if timed else None,
            "median_step_seconds": statistics.median(timed) if timed else None,
            "num_steps": len(timed),
            "peak_memory_gb": peak / 1e9,
            "memory_of": torch.cuda.get_device_name(device) if on_gpu else "process, no GPU",
        }
        path.write_text(json.dumps(row) + "\n")


def _wait(trainer: L.Trainer) -> None:
    """A GPU works on after the call returns."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
