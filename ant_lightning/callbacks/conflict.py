"""`ConflictMonitor`: losses, weights and gradient cosines of the tasks during training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ant_lightning.balancing.reduction import default_reduction
from ant_lightning.callbacks.base import RunCallback, steps_of
from ant_lightning.callbacks.figures import save_figure
from ant_lightning.callbacks.task_figures import pair_heat_map, task_history, task_labels
from ant_lightning.errors import check_at_least
from ant_lightning.tasks.time_axis import TimeAxis

if TYPE_CHECKING:
    import lightning as L

    from ant_lightning.balancing.backward import BackwardReport
    from ant_lightning.models.module import MultiTaskDiffusion


class _Step(NamedTuple):
    """What is kept of a step until the next log; adding it up then costs the step nothing."""

    report: BackwardReport
    tasks: Tensor  # of the images of this rank, [b]
    importance: Tensor | None  # [b], see `Draws`


class ConflictMonitor(RunCallback):
    """Logs loss and effective weight of each task and the conflict of their gradients.

    Scalars, means since the last log: `train/task_i/loss`, the squared error without any weight or
    further term, as in `train/loss` and `val/task_i/loss`; `/objective`, the loss that the balancer
    sees, with the loss weights of the process, the term of a learned variance and an auxiliary
    term; and `/weight`. Scalars of one batch: `/grad_norm`; `train/conflicting_pairs`, the share of
    pairs of tasks whose gradients have a negative dot product; `train/mean_cosine`, the mean of
    their cosines. Figures: losses and weights on log axes, and the cosines `[k, k]` of the
    gradients, averaged since the last figure. Methods that need no Gramian do not compute task
    gradients; for them a probe computes those of the batch in an extra pass.

    Args:
        log_every_n_steps: Steps between scalars.
        probe_every_n_steps: Steps between probes of the gradients; 0 for none.

    Raises:
        ConfigError: If a number is out of range.

    Examples:
        >>> import lightning as L
        >>> from ant_lightning import ConflictMonitor
        >>> trainer = L.Trainer(callbacks=[ConflictMonitor(probe_every_n_steps=100)], logger=False)
        >>> trainer.callbacks[0].probe_every_n_steps
        100
    """

    _window: list[_Step]  # the steps since the last log
    _history: list[tuple[int, Tensor, Tensor]]  # step, mean losses and mean weights of each log
    _cosines: list[Tensor]  # [k, k] since the last figure
    run_state: ClassVar = {"_window": list, "_history": list, "_cosines": list}

    def __init__(self, *, log_every_n_steps: int = 50, probe_every_n_steps: int = 200) -> None:
        check_at_least(1, log_every_n_steps=log_every_n_steps)
        check_at_least(0, probe_every_n_steps=probe_every_n_steps)
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
        """Keep the losses and weights of the step; log when it is due."""
        report = pl_module.last_report
        draws = pl_module.last_draws
        if report is None or not report.finite:
            return
        assert draws is not None, "a step has draws"
        self._window.append(_Step(report, *draws))
        step = trainer.global_step
        log = step % self.log_every_n_steps == 0
        probe = self.probe_every_n_steps > 0 and step % self.probe_every_n_steps == 0
        gramian = report.gramian
        if gramian is None and probe:
            gramian = pl_module.task_gradients(batch, step=step).gramian()
        logs: dict[str, float] = {}
        if gramian is not None and (probe or log):
            logs |= self._conflict(gramian.detach().cpu())
        if log:
            means = self._means()
            self._window.clear()
            self._history.append((step, means["loss"], means["weight"]))
            for name, values in means.items():
                logs |= {f"train/task_{i}/{name}": value for i, value in enumerate(values.tolist())}
        if logs:
            pl_module.log_now(logs)

    def on_validation_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Draw the curves since the start, and the cosines since the last validation."""
        time = TimeAxis.of(pl_module.process)
        labels = task_labels(pl_module.clusters, time)
        if len(self._history) > 1:
            save_figure(
                trainer,
                task_history(
                    *(each.numpy() for each in self._curves().values()),
                    labels=labels,
                    unit=time.unit,
                ),
                tag="3_tasks/losses_and_weights",
                explain="Left: a task whose loss rises while others fall is losing. "
                "Right: a higher line counts more in the step; equal lines are plain averaging.",
            )
        if self._cosines:
            cosines = torch.stack(self._cosines)
            count = f"{len(cosines)} batch" + "es" * (len(cosines) > 1)
            title = f"mean of {count} up to step {steps_of(trainer, pl_module)}"
            if len(pairs := _pairs(cosines)):
                # The scalar of the same batches: a pair may conflict in some and not in the mean.
                title += f"; {float((pairs < 0).double().mean()):.0%} of pairs conflict in a batch"
            figure = pair_heat_map(
                cosines.nanmean(0).nan_to_num().numpy(),
                labels=labels,
                title=title,
                rows="",
                unit=time.unit,
                bar="cosine of the gradients",
            )
            save_figure(
                trainer,
                figure,
                tag="4_conflict/gradient_cosines",
                explain="Blue: a step on task i hurts task j (conflict). Red: it helps.",
            )
            self._cosines.clear()

    def state_dict(self) -> dict[str, Any]:
        """The curves: a resumed run continues them, and an evaluation draws them."""
        return {"history": self._curves(), "cosines": list(self._cosines)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the curves of a checkpoint; older checkpoints have a list of rows."""
        history = state_dict["history"]
        if isinstance(history, dict):
            tensors = history["losses"].unbind(), history["weights"].unbind()
            history = zip(history["steps"].tolist(), *tensors, strict=True)
        self._history = [(step, losses, weights) for step, losses, weights in history]
        self._cosines = list(state_dict.get("cosines", []))

    def _means(self) -> dict[str, Tensor]:
        """Loss, objective and weight of each task over the window, `[k]` each, of all ranks."""
        reports = [step.report for step in self._window]
        errors = torch.cat([report.aux for report in reports if report.aux is not None])
        drawn = [step.importance for step in self._window if step.importance is not None]
        shares = torch.cat(drawn).to(errors) if drawn else torch.ones_like(errors)
        # Sums over the images of each task and of what they are divided by, [2, k].
        sums = torch.zeros_like(torch.stack([reports[0].num_samples] * 2))
        tasks = torch.cat([step.tasks for step in self._window]).to(sums.device)
        sums.index_add_(1, tasks, torch.stack([errors * shares, shares]).to(sums))
        total, count = default_reduction().all_reduce_(sums)
        objectives = torch.stack([report.task_losses for report in reports])
        weights = torch.stack([report.task_weights for report in reports])
        # A task without an image in a step has objective NaN; without one in the window, loss NaN.
        means = {"loss": total / count, "objective": objectives.nanmean(0)}
        means["weight"] = weights.nanmean(0)
        return {name: mean.cpu() for name, mean in means.items()}

    def _curves(self) -> dict[str, Tensor]:
        """`steps` `[n]`, `losses` and `weights` `[n, k]`: three tensors are fast to store."""
        steps, losses, weights = zip(*self._history, strict=True) if self._history else ((),) * 3
        return {
            "steps": torch.tensor(steps, dtype=torch.int64),
            "losses": torch.stack(losses) if losses else torch.zeros(0),
            "weights": torch.stack(weights) if weights else torch.zeros(0),
        }

    def _conflict(self, gramian: Tensor) -> dict[str, float]:
        """Norms and conflicts of a Gramian `[k, k]`; keeps its cosines for the figure."""
        norms = gramian.diagonal().clamp(min=0).sqrt()
        cosines = gramian / norms.outer(norms)
        self._cosines.append(cosines)  # NaN for a task without a gradient: `nanmean` skips it
        logs = {f"train/task_{i}/grad_norm": norm for i, norm in enumerate(norms.tolist())}
        pairs = _pairs(cosines)
        if len(pairs):
            logs["train/conflicting_pairs"] = float((pairs < 0).double().mean())
            logs["train/mean_cosine"] = float(pairs.mean())
        return logs


def _pairs(cosines: Tensor) -> Tensor:
    """The cosines of pairs of two tasks in `[.., k, k]` where both have a gradient, flat."""
    first, second = torch.triu_indices(cosines.shape[-1], cosines.shape[-1], offset=1)
    found = cosines[..., first, second].flatten()
    return found[found.isfinite()]
