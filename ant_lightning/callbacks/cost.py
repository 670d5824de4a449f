"""What a training step costs: time and memory, into a file."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch

from ant_lightning.callbacks.base import RunCallback
from ant_lightning.callbacks.figures import log_folder
from ant_lightning.errors import check_at_least
from ant_lightning.files.json_file import write_json

if TYPE_CHECKING:
    from ant_lightning.models.module import MultiTaskDiffusion


class StepCost(RunCallback):
    """Writes `step_cost.json` into the log folder when training ends.

    The file has `iterations_per_second` (from the mean time of a step, because some methods have
    two kinds of step), `median_step_seconds`, the number `num_steps` of timed steps, and
    `peak_memory_gb`. That is the most that PyTorch allocated on the GPU or, without a GPU, the
    largest resident size of the process, imports included. Data loading and validation do not
    count. Times are null if no step was timed.

    Args:
        skip_steps: First steps that are not timed.

    Raises:
        ConfigError: If `skip_steps` is below 0.

    Examples:
        >>> import lightning as L
        >>> from ant_lightning import StepCost
        >>> trainer = L.Trainer(callbacks=[StepCost(skip_steps=20)], logger=False)
        >>> trainer.callbacks[0].skip_steps
        20
    """

    module_type = L.LightningModule  # also an autoencoder
    _seconds: list[float]
    run_state: ClassVar = {"_seconds": list}

    def __init__(self, *, skip_steps: int = 10) -> None:
        check_at_least(0, skip_steps=skip_steps)
        super().__init__()
        self.skip_steps = skip_steps
        self._start = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Start the clock."""
        self._start = _time(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Stop the clock."""
        self._seconds.append(_time(trainer) - self._start)

    def on_train_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Write the file; without a timed step, a resumed run keeps the earlier file."""
        if not trainer.is_global_zero:
            return
        timed = self._seconds[self.skip_steps :]
        path = log_folder(trainer) / "step_cost.json"
        if not timed and path.exists():
            return
        device = pl_module.device
        on_gpu = device.type == "cuda"
        # `ru_maxrss` is in bytes on macOS and in KiB elsewhere.
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resident *= 1 if sys.platform == "darwin" else 1024
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else resident
        row = {
            "iterations_per_second": len(timed) / sum(timed) if timed else None,
            "median_step_seconds": statistics.median(timed) if timed else None,
            "num_steps": len(timed),
            "peak_memory_gb": peak / 1e9,
            "memory_of": torch.cuda.get_device_name(device) if on_gpu else "process, no GPU",
        }
        write_json(path, row)


def _time(trainer: L.Trainer) -> float:
    """The time when the GPU has finished its work: kernels run asynchronously."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
