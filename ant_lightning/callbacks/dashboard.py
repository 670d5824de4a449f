"""TensorBoard's pages: charts that belong together side by side, and how to read each."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from ant_lightning.callbacks.base import RunCallback, steps_of
from ant_lightning.callbacks.figures import log_folder
from ant_lightning.callbacks.page_figure import stacked_page

if TYPE_CHECKING:
    from pathlib import Path

    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["Dashboard"]

# Pictures of the page, in the order in which to look at them.
_PAGE = {
    "1  Do the images look real?": "1_samples/grid",
    "2  How near are they to real images, and are they copies?": "2_quality/history",
    "3  Which task learns, and which one counts?": "3_tasks/losses_and_weights",
    "4  Do the tasks want the same change of the weights?": "4_conflict/gradient_cosines",
}

# Chart and its sentence; `{task}` stands for every task.
_CHARTS: dict[str, list[tuple[str, str, list[str]]]] = {
    "2 quality": [
        (
            "FID",
            "Good when val/fid reaches val/fid_real, which is what real images score; far below "
            "it on val/fid_train alone means copying.",
            ["val/fid", "val/fid_real", "val/fid_train"],
        ),
        (
            "precision and recall",
            "Precision: share of generated images that look real. Recall: share of real images "
            "that the model can make. Both should be high.",
            ["val/precision", "val/recall", "val/class_agreement"],
        ),
        (
            "nearest training image",
            "Generated images should be as far from the training images as held-out ones are; "
            "much nearer is memorising.",
            ["val/nearest_train_median", "val/nearest_train_real_median"],
        ),
    ],
    "3 tasks": [
        (
            "loss of each task",
            "Task 0 is the least noise. A task whose curve goes up while others fall is losing.",
            ["val/task_{task}/loss"],
        ),
        (
            "effective weight of each task",
            "How much each task counts in the step; equal lines are plain averaging.",
            ["train/task_{task}/weight"],
        ),
    ],
    "4 conflict": [
        (
            "conflicting pairs",
            "Share of pairs of tasks whose gradients point against each other; 0 is harmony.",
            ["train/conflicting_pairs"],
        ),
        (
            "gradient norm of each task",
            "The task with the longest gradient decides the step unless a balancer intervenes.",
            ["train/task_{task}/grad_norm"],
        ),
    ],
}


class Dashboard(RunCallback):
    """Arranges what other callbacks log for a reader who is in a hurry.

    After each validation the tab "Images" gets one page (`0_page/overview`, click to enlarge) of
    the pictures that other callbacks drew, each under the question that it answers; it is kept as
    `0_page_overview.png` in the log folder, too. The tab "Custom Scalars" gets a chart for each
    question, and the tab "Text" says how to read every picture and chart.

    Attributes:
        pictures: Files that callbacks of this run drew, by tag; others may lie in the same folder.
    """

    pictures: dict[str, Path]
    module_type = L.LightningModule
    of_run: ClassVar = {"pictures": dict}

    def on_validation_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Put what is drawn so far on one page; the other callbacks come first in the list."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        pictures = {
            title: self.pictures[tag] for title, tag in _PAGE.items() if tag in self.pictures
        }
        if not pictures:
            return
        page = stacked_page(pictures)
        Image.fromarray(page).save(log_folder(trainer) / "0_page_overview.png")
        step = steps_of(trainer, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("0_page/overview", page, step, dataformats="HWC")

    def on_fit_start(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Write both, once; an autoencoder has no tasks to chart."""
        if not trainer.is_global_zero or not hasattr(pl_module, "num_tasks"):
            return
        layout = {
            group: {
                title: ["Multiline", _patterns(tags, pl_module.num_tasks)]
                for title, _, tags in charts
            }
            for group, charts in _CHARTS.items()
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout)
                logger.experiment.add_text("0_how_to_read", _guide(pl_module))


def _patterns(tags: list[str], num_tasks: int) -> list[str]:
    """Tags with `{task}` written out, as TensorBoard's regular expressions match parts too."""
    written = []
    for tag in tags:
        tasks = range(num_tasks) if "{task}" in tag else range(1)
        written += [f"^{tag.format(task=task)}$" for task in tasks]
    return written


def _guide(pl_module: MultiTaskDiffusion) -> str:
    """Markdown: one line for each thing to look at."""
    boundaries = pl_module.clusters.boundaries
    tasks = ", ".join(
        f"task {i} = {start}..{boundaries[i + 1] - 1}" for i, start in enumerate(boundaries[:-1])
    )
    method = "vanilla" if pl_module.balancer is None else type(pl_module.balancer).__name__
    lines = [
        f"**{type(pl_module.backbone).__name__} trained with {method}.** A task is an interval of "
        f"timesteps, from little noise to much: {tasks}.",
        "",
        "`0_page/overview` (Images, click to enlarge) has the pictures on one page. One by one:",
        "",
        "1. `1_samples/grid` (Images): generated beside real; left should look like right.",
    ]
    for number, (group, charts) in enumerate(_CHARTS.items(), start=2):
        lines.append(f"{number}. **{group[2:]}** (Custom Scalars; figures in Images)")
        lines += [f"    * *{title}*: {sentence}" for title, sentence, _ in charts]
    lines.append(
        "5. `4_conflict/gradient_cosines` (Images): blue pairs of tasks hurt each other, red help."
    )
    return "\n".join(lines)
