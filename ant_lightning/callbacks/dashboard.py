"""`Dashboard`: figures and charts of a run on TensorBoard's pages, and how to read each."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from ant_lightning.callbacks.base import RunCallback, steps_of
from ant_lightning.callbacks.figures import log_folder, picture_file
from ant_lightning.callbacks.page_figure import stacked_page
from ant_lightning.callbacks.task_figures import task_labels
from ant_lightning.files.atomic import write_atomically
from ant_lightning.models.module import MultiTaskDiffusion
from ant_lightning.runtime.loggers import send_picture
from ant_lightning.tasks.time_axis import TimeAxis


class Dashboard(RunCallback):
    """Collects what other callbacks log, with explanations, on one page.

    After each validation every logger that shows pictures gets one page (`0_page/overview`) with
    losses and scores, and the figures of the other callbacks, each below the question that it
    answers; the page is also `0_page_overview.png` in the log folder. In TensorBoard the tab
    "Custom Scalars" gets a chart for each question, and the tab "Text" says how to read every
    figure and chart. `dashboard.json` beside this file has the questions, charts and sentences.

    Attributes:
        pictures: Files of the figures of this run, by tag; `save_figure` adds them.

    Examples:
        >>> import lightning as L
        >>> from ant_lightning import ConflictMonitor, Dashboard
        >>> trainer = L.Trainer(callbacks=[ConflictMonitor(), Dashboard()], logger=False)
        >>> trainer.callbacks[1].pictures
        {}
    """

    module_type = L.LightningModule  # also an autoencoder
    pictures: dict[str, Path]
    run_state: ClassVar = {"pictures": dict}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write charts and text once; an autoencoder has no tasks to chart.

        Lightning skips this in a run that has all its steps, which then writes nothing twice.
        """
        if not trainer.is_global_zero or not isinstance(pl_module, MultiTaskDiffusion):
            return
        content = _content()
        layout = {
            group: {
                # The page of charts shows nothing but titles, so they hold the sentences.
                f"{title}: {sentence}": ["Multiline", _patterns(tags, pl_module.num_tasks)]
                for title, (sentence, tags) in of_group.items()
                if tags  # a picture has none
            }
            for group, of_group in content["charts"].items()
        }
        for logger in _tensorboards(trainer):
            logger.experiment.add_custom_scalars(layout)
            logger.experiment.add_text("0_how_to_read", _guide(pl_module, content))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the figures on one page; callbacks that draw them must come earlier in the list."""
        if trainer.sanity_checking or not trainer.is_global_zero or not self.pictures:
            return
        questions, pictures = _content()["pictures"], dict(self.pictures)
        if trainer.state.fn != "fit":  # beside those of this command, what the run drew before
            drawn = {tag: picture_file(trainer, tag) for tag in questions.values()}
            pictures = {tag: path for tag, path in drawn.items() if path.is_file()} | pictures
        found = {q: pictures[tag] for q, tag in questions.items() if tag in pictures}
        if not found:  # only pictures that are not on the page
            return
        step = steps_of(trainer, pl_module)
        page = stacked_page(found, numbers=_numbers(step, trainer))
        picture = Image.fromarray(page)
        write_atomically(
            log_folder(trainer) / "0_page_overview.png", partial(picture.save, format="PNG")
        )
        send_picture(trainer.loggers, "0_page/overview", page, step=step)


def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())
    return content


def _numbers(step: int, trainer: L.Trainer) -> str:
    """The step, its losses, and the scores that the images of the page have."""
    words, metrics = _content()["numbers"], trainer.callback_metrics
    # Of `GenerationMetrics`, which imports this folder: `isinstance` would need a circle.
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    network = next((found for each in callbacks if (found := getattr(each, "scored_by", ""))), "")
    words["val/fid"] += f" ({network})" if network else ""
    names = {n: n.replace("val/", "test/") if "test/loss" in metrics else n for n in words}
    values = [f"{words[n]} {float(metrics[m]):.4g}" for n, m in names.items() if m in metrics]
    return f"step {step}:  " + ",  ".join(values)


def _tensorboards(trainer: L.Trainer) -> list[TensorBoardLogger]:
    return [each for each in trainer.loggers if isinstance(each, TensorBoardLogger)]


def _patterns(tags: list[str], num_tasks: int) -> list[str]:
    """Regular expressions for whole tags, with one for each task where `{task}` stands."""
    each = (tag.format(task=task) for tag in tags for task in range(num_tasks))
    return [f"^{tag}$" for tag in dict.fromkeys(each)]  # a tag without `{task}` once


def _guide(pl_module: MultiTaskDiffusion, content: dict[str, Any]) -> str:
    """Markdown with one line for each thing to look at."""
    charts = []
    for group, of_group in content["charts"].items():
        # A group is called `3 tasks`: TensorBoard sorts groups by name.
        charts.append(f"{group[0]}. **{group[2:]}** (Custom Scalars; figures in Images)")
        charts += [f"    * *{title}*: {sentence}" for title, (sentence, _) in of_group.items()]
    time = TimeAxis.of(pl_module.process)
    labels = enumerate(task_labels(pl_module.clusters, time))
    return "\n".join(content["guide"]).format(
        network=type(pl_module.backbone).__name__,
        method="vanilla" if pl_module.balancer is None else type(pl_module.balancer).__name__,
        tasks=", ".join(f"task {i} = {label}" for i, label in labels),
        charts="\n".join(charts),
        unit=time.unit,
    )
