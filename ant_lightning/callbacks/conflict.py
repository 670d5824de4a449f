"""What the tasks do to each other while they train: losses, weights, gradient cosines."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ant_lightning.callbacks.base import RunCallback, steps_of
from ant_lightning.callbacks.figures import save_figure
from ant_lightning.callbacks.task_figures import cosine_heat_map, task_history
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["ConflictMonitor"]


class ConflictMonitor(RunCallback):
    """Logs, for every method alike, the loss and effective weight of each task and their conflict.

    Scalars: `train/task_i/loss` and `/weight` (means since the last log), `/grad_norm`, and
    `train/conflicting_pairs`, the share of pairs of tasks whose gradients have a negative dot
    product. Figures: losses and weights on log axes, and the k x k cosines of the gradients
    averaged since the last figure. Steps that make no Gramian are probed: one pass over the batch
    more.

    Args:
        log_every_n_steps: Steps between scalars.
        probe_every_n_steps: Steps between probes of the gradients; 0 for none.
    """

    _window: list[tuple[Tensor, Tensor]]
    _history: list[tuple[int, Tensor, Tensor]]
    _cosines: list[Tensor]
    of_run: ClassVar = {"_window": list, "_history": list, "_cosines": list}

    def __init__(self, *, log_every_n_steps: int = 50, probe_every_n_steps: int = 200) -> None:
        if log_every_n_steps < 1 or probe_every_n_steps < 0:
            raise ConfigError(
                "ConflictMonitor: log_every_n_steps must be at least 1 and probe_every_n_steps 0 "
                f"or more, found {log_every_n_steps} and {probe_every_n_steps}"
            )
        super().__init__()
        self.log_every_n_steps = log_every_n_steps
        self.probe_every_n_steps = probe_every_n_steps

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: MultiTaskDiffusion,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Remember the step; log when it is time."""
        report = pl_module.last_report
        if report is None or not report.finite:
            return
        self._window.append((report.task_losses, report.task_weights))
        step = trainer.global_step
        probe = self.probe_every_n_steps and step % self.probe_every_n_steps == 0
        gramian = report.gramian
        if gramian is None and probe:
            gramian = pl_module.task_gradients(batch, step=step).gramian()
        logs: dict[str, float] = {}
        if gramian is not None and (probe or step % self.log_every_n_steps == 0):
            logs |= self._conflict(gramian)
        if step % self.log_every_n_steps == 0:
            losses, weights = (
                torch.stack(each).nanmean(0) for each in zip(*self._window, strict=True)
            )
            self._window.clear()
            self._history.append((step, losses.cpu(), weights.cpu()))
            for task, (loss, weight) in enumerate(
                zip(losses.tolist(), weights.tolist(), strict=True)
            ):
                logs[f"train/task_{task}/loss"] = loss
                logs[f"train/task_{task}/weight"] = weight
        if logs:
            pl_module.log_now(logs)

    def on_validation_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Draw what was seen since the start, and the cosines since the last validation."""
        boundaries = pl_module.clusters.boundaries
        labels = [f"{a}-{b - 1}" for a, b in pairwise(boundaries)]
        if len(self._history) > 1:
            steps, losses, weights = zip(*self._history, strict=True)
            figure = task_history(
                np.array(steps),
                torch.stack(losses).numpy(),
                torch.stack(weights).numpy(),
                labels=labels,
            )
            save_figure(
                trainer,
                figure,
                tag="3_tasks/losses_and_weights",
                explain="Left: a task whose loss rises while others fall is losing. "
                "Right: a higher line counts more in the step; equal lines are plain averaging.",
            )
        if self._cosines:
            mean = torch.stack(self._cosines).nanmean(0).nan_to_num()
            step = steps_of(trainer, pl_module)
            title = f"mean of {len(self._cosines)} batches up to step {step}"
            figure = cosine_heat_map(mean.numpy(), labels=labels, title=title)
            save_figure(
                trainer,
                figure,
                tag="4_conflict/gradient_cosines",
                explain="Blue: a step on task i hurts task j (conflict). Red: it helps.",
            )
            self._cosines.clear()

    def state_dict(self) -> dict[str, Any]:
        """What is to be drawn, so that a resumed run goes on, and an evaluation draws it too.

        Three tensors, as a file of two for each record takes seconds to write in a run of days.
        """
        steps, losses, weights = zip(*self._history, strict=True) if self._history else ((),) * 3
        history = {"steps": torch.tensor(steps, dtype=torch.int64)}
        for name, values in (("losses", losses), ("weights", weights)):
            history[name] = torch.stack(values) if values else torch.zeros(0)
        return {"history": history, "cosines": list(self._cosines)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the curves of a checkpoint; early ones have a list of the records."""
        history = state_dict["history"]
        if isinstance(history, dict):
            tensors = history["losses"].unbind(), history["weights"].unbind()
            history = zip(history["steps"].tolist(), *tensors, strict=True)
        self._history = [tuple(row) for row in history]  # type: ignore[misc]
        self._cosines = list(state_dict.get("cosines", []))

    def _conflict(self, gramian: Tensor) -> dict[str, float]:
        """Norms and conflicts of one Gramian; its cosines are kept for the figure."""
        gramian = gramian.detach().cpu()
        norms = gramian.diagonal().clamp(min=0).sqrt()
        cosines = gramian / norms.outer(norms)
        self._cosines.append(cosines)
        pairs = torch.triu_indices(len(norms), len(norms), offset=1)
        negative = (cosines[pairs[0], pairs[1]] < 0).double()
        logs = {f"train/task_{i}/grad_norm": norm for i, norm in enumerate(norms.tolist())}
        if len(negative):
            logs["train/conflicting_pairs"] = float(negative.mean())
        return logs
