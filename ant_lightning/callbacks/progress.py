"""The progress of a run: one bar over all its steps, or lines if the output is not a terminal."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Timer, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from ant_lightning.callbacks.base import callback_of
from ant_lightning.callbacks.run_lines import RunLines
from ant_lightning.runtime.progress_display import LINE_INTERVAL, ProgressDisplay, clock

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning as L

    from ant_lightning.models.denoiser import DiffusionModule

_WEIGHTS, _LISTED = "weights of the", 10  # tasks with a weight of their own in a line


class _Bar(Tqdm):
    """Shows the items that fit beside it, whole; the weights of the tasks are left out first."""

    note = ""  # in front of the items

    def set_postfix(self, ordered_dict: Any = None, refresh: bool = True, **items: Any) -> None:  # noqa: ANN401
        """Choose from `name=value` items, in this order."""
        if self.disable:
            return
        texts = [self.note] * bool(self.note) + [
            f"{name}={value if isinstance(value, str) else self.format_num(value)}"
            for name, value in {**(ordered_dict or {}), **items}.items()
        ]
        # Without a width the bar has 10 characters, which may become half as many.
        bare = self.format_meter(**{**self.format_dict, "postfix": "", "ncols": None})
        room = float("inf") if self.ncols is None else self.ncols - len(bare) + 5
        shown = []
        for text in sorted(texts, key=lambda text: text.startswith(_WEIGHTS)):
            if room >= len(text) + 2:
                room -= len(text) + 2
                shown.append(text)
        self.set_postfix_str(", ".join(text for text in texts if text in shown), refresh)


class TrainingProgress(TQDMProgressBar):
    """Shows steps done and planned, time left, loss, images/s and the weights of the tasks.

    The bar goes from the first optimizer step of a run to its last (`max_steps`, or `max_epochs`);
    a resumed run starts at its step. With `max_time`, the bar also shows the time until then.
    If the output is not a terminal, a line is printed every 30 seconds, after each validation and
    at the end. A line counts the batches of a long validation or test too.

    Images/s is over all ranks since the last logged step, without validation. It is also logged as
    `train/images_per_second`. The weights of the tasks are shares of their sum, from
    task 0 (the least noise) on: `weights of the 5 tasks 20/20/20/20/20 %` is equal weighting. Of
    more than 10 tasks the smallest and the largest are shown. A bar leaves out what does not fit.

    Args:
        refresh_rate: Steps between redraws; the bar is also redrawn when a second has passed.
        line_interval: Seconds between two lines.

    Examples:
        >>> import lightning as L
        >>> from ant_lightning import TrainingProgress
        >>> trainer = L.Trainer(callbacks=[TrainingProgress(line_interval=60.0)], logger=False)
        >>> trainer.progress_bar_callback.line_interval
        60.0
    """

    def __init__(self, *, refresh_rate: int = 20, line_interval: float = 30.0) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.line_interval = line_interval
        self.images_per_second = 0.0
        self._num_images = 0  # since the last logged step
        self._seconds = 0.0  # that the steps of these images took
        self._total: int | None = None
        self._first_step = 0
        # Times of: start of the run, start of the step, last redraw, last line.
        self._begun = self._step_begun = self._drawn = self._printed = 0.0
        self._printed_step = -1
        self._batches: ProgressDisplay | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether bars are drawn: only a terminal can redraw them."""
        return super().is_enabled and sys.stdout.isatty()

    def init_train_tqdm(self) -> Tqdm:
        """One bar for the run."""
        return _Bar(
            desc=self.train_description,
            initial=self._first_step,
            total=self._total,
            unit=" steps",
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def init_validation_tqdm(self) -> Tqdm:
        """No bar of its own during training: the run's bar says that it is validating."""
        fitting = self.trainer.state.fn == "fit"
        return Tqdm(disable=True) if fitting else super().init_validation_tqdm()

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Start the bar at the run's first step."""
        total = trainer.estimated_stepping_batches
        self._total = int(total) if total < float("inf") else None
        self._first_step = trainer.global_step
        self._begun = self._printed = time.perf_counter()
        super().on_train_start(trainer)

    def on_train_epoch_start(self, *args: Any) -> None:
        """Keep the run's bar, where Lightning would start one for the epoch."""

    def on_train_epoch_end(self, *args: Any) -> None:
        """Keep the run's bar: there is none for the epoch to end."""

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock."""
        super().on_train_batch_start(*args)
        self._step_begun = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,  # noqa: ANN401 - ours, or an autoencoder
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Stop the clock; log and start a new mean at every logged step."""
        now = time.perf_counter()
        # Only the time within steps counts, without loading and validation.
        self._seconds += now - self._step_begun
        self._num_images += len(batch.images) * trainer.world_size
        self.images_per_second = self._num_images / self._seconds
        if pl_module.log_due:
            pl_module.log_now({"train/images_per_second": self.images_per_second})
            self._num_images, self._seconds = 0, 0.0
        step = trainer.global_step
        if step % max(1, self.refresh_rate) == 0 or step == self._total or now - self._drawn > 1:
            self._drawn = now
            self._draw(trainer, pl_module)
            if now - self._printed >= self.line_interval:
                self._print(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show on the bar that the run is validating."""
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer, pl_module, note="validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the measured values."""
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting:
            self.train_progress_bar.note = ""
        super().on_validation_end(trainer, pl_module)  # which draws the bar
        if fitting:
            self._print(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last step."""
        self._draw(trainer, pl_module)
        super().on_train_end(trainer, pl_module)
        if self._printed_step != trainer.global_step:
            self._print(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to count the batches of a validation or a test."""
        self._batches = progress_of(
            trainer, "batches", first_line=False, bar=False, hidden=trainer.sanity_checking
        )

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Print how many batches are done, in a long validation."""
        super().on_validation_batch_end(trainer, *args)
        self._show_batch(trainer.num_val_batches)

    def on_test_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Print how many batches are done, in a long test."""
        super().on_test_batch_end(trainer, *args)
        self._show_batch(trainer.num_test_batches)

    def _show_batch(self, batches: list[int | float]) -> None:
        total = sum(batches)
        if self._batches is not None:
            self._batches.show(self._batches.done + 1, int(total) if total < float("inf") else None)

    def state_dict(self) -> dict[str, Any]:
        """The last speed, for reports."""
        return {"images_per_second": self.images_per_second}

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The values that the bar and the lines show."""
        items: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        items.pop("v_num", None)
        items["images/s"] = f"{self.images_per_second:.0f}"
        report = getattr(pl_module, "last_report", None)
        if report is not None and getattr(pl_module, "balancer", None) is not None:
            shares = (100 * report.task_weights / report.task_weights.sum()).tolist()
            text = "/".join(f"{share:.0f}" for share in shares)
            if len(shares) > _LISTED:
                text = f"{min(shares):.2g} to {max(shares):.2g}"
            items[f"{_WEIGHTS} {len(shares)} tasks"] = f"{text} %"
        timer = callback_of(trainer, Timer)
        left = None if timer is None else timer.time_remaining()
        if left:
            items["max_time in"] = clock(max(0.0, left))
        return items

    @property
    def last_line(self) -> float:
        """Time of the last line, by `time.perf_counter`."""
        return self._printed

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule, *, note: str = "") -> None:
        if not self.train_progress_bar.disable:
            self.train_progress_bar.note = note
            self.train_progress_bar.n = trainer.global_step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def _print(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print a line with what the bar would show."""
        self._printed = time.perf_counter()
        self._printed_step = step = trainer.global_step
        parts = [f"step {step}" if self._total is None else f"step {step}/{self._total}"]
        made, seconds = step - self._first_step, self._printed - self._begun
        if self._total is not None and made > 0 and step < self._total:
            parts.append(f"{clock(seconds / made * (self._total - step))} left")
        items = self.get_metrics(trainer, pl_module)
        if "val/fid" in trainer.callback_metrics:
            items["val/fid"] = float(trainer.callback_metrics["val/fid"])
        for name, value in items.items():
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        self._line(", ".join(parts))

    def _line(self, text: str) -> None:
        # Only where a bar would be drawn (rank 0, bars not disabled) if there were a terminal.
        if super().is_enabled and not self.is_enabled:
            print(text, flush=True)


def progress_of(
    trainer: L.Trainer,
    unit: str,
    *,
    command: str | None = None,
    total: int | None = None,
    done: int = 0,
    first_line: bool = True,
    bar: bool = True,
    hidden: bool = False,
) -> ProgressDisplay:
    """A display of work in a command of the Trainer, on rank 0, if the trainer has a progress bar.

    In `fit` no line is printed at the start, and lines are as far apart as those of the training.

    Args:
        trainer: The trainer.
        unit: What is counted, in the plural.
        command: Its name in the lines; by default that of the Trainer's command.
        total: How many there are.
        done: How many of them were done before.
        first_line: Whether to print a line at the start.
        bar: Whether to draw a bar in a terminal.
        hidden: Whether to show nothing.
    """
    own = trainer.progress_bar_callback
    is_off = own is None or getattr(own, "refresh_rate", 1) == 0
    fitting = trainer.state.fn == "fit"
    apart = own.line_interval if isinstance(own, TrainingProgress) else 3 * LINE_INTERVAL
    lines = callback_of(trainer, RunLines)
    name = "" if trainer.state.fn is None else trainer.state.fn.value
    name = (lines and lines.called) or name
    return ProgressDisplay(
        command or name,
        unit,
        total=total,
        done=done,
        interval=apart if fitting else None,
        since=own.last_line if fitting and isinstance(own, TrainingProgress) else None,
        first_line=first_line and not fitting,
        bar=bar,
        hidden=hidden or is_off or not trainer.is_global_zero,
    )


@contextmanager
def showing_steps(module: DiffusionModule, shown: ProgressDisplay) -> Iterator[ProgressDisplay]:
    """Inside, the steps of the module's sampler are shown, as a batch may take minutes."""
    module.sampling_progress = shown.step
    try:
        with shown:
            yield shown
    finally:
        module.sampling_progress = None
