"""The progress bar of training: loss, images per second, weights of the tasks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import TQDMProgressBar

if TYPE_CHECKING:
    import lightning as L

    from ant_lightning.modules import MultiTaskDiffusion

__all__ = ["TrainingProgress"]


class TrainingProgress(TQDMProgressBar):
    """Lightning's bar with images/s and the share of each task in the weights, in per cent.

    Images/s is over all ranks and since the last logged step; validation does not count. It is
    also logged as `train/images_per_second`.

    Args:
        refresh_rate: Steps between two drawings.
    """

    def __init__(self, *, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.images_per_second = 0.0
        self._images = 0
        self._seconds = 0.0
        self._start = 0.0

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        super().on_train_batch_start(*args, **kwargs)
        self._start = time.perf_counter()

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: MultiTaskDiffusion,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Stop the clock; log and start a new mean at every logged step."""
        self._seconds += time.perf_counter() - self._start
        self._images += len(batch.images) * trainer.world_size
        self.images_per_second = self._images / self._seconds
        if pl_module.log_due:
            pl_module.log_now({"train/images_per_second": self.images_per_second})
            self._images, self._seconds = 0, 0.0
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def state_dict(self) -> dict[str, Any]:
        """The last speed, for reports."""
        return {"images_per_second": self.images_per_second}

    def get_metrics(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion
    ) -> dict[str, Any]:
        """What stands behind the bar."""
        items: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        items.pop("v_num", None)
        items["images/s"] = f"{self.images_per_second:.0f}"
        report = getattr(pl_module, "last_report", None)
        if report is not None and pl_module.balancer is not None:
            shares = 100 * report.task_weights / report.task_weights.sum()
            items["weights %"] = "/".join(f"{share:.0f}" for share in shares.tolist())
        return items
