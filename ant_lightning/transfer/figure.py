"""Figure of negative-transfer gaps: bars by interval, with several models beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ant_lightning.tasks.time_axis import TimeAxis

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes

    from ant_lightning.transfer.result import TransferGapResult

_SAME = {"iterations": "as many steps", "samples": "as many images of the interval"}


def transfer_gap_bars(
    results: Mapping[str, TransferGapResult], *, time: TimeAxis | None = None
) -> Figure:
    """A panel for each gap and budget, a group of bars for each interval, a bar for each model.

    The loss gap is in percent of the multi-task model's loss in the interval, so that intervals
    share an axis. Lines are bootstrap intervals.

    Args:
        results: Results by the name of the multi-task model, all with the same intervals and
            budgets.
        time: The process' own time, for the names of the intervals; timesteps by default.
    """
    first = next(iter(results.values()))
    kinds = ["loss", "fid"] if first.num_images else ["loss"]
    size = (1 + 4.6 * len(first.budgets), 0.8 + 2.7 * len(kinds))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(
        len(kinds), len(first.budgets), squeeze=False, sharex=True, sharey="row"
    )
    for row, kind in zip(panels, kinds, strict=True):
        label = "loss gap, % of the loss" if kind == "loss" else "FID gap"
        row[0].set_ylabel(f"{label}\n(below 0: negative transfer)", fontsize=9)
        for panel, budget in zip(row, first.budgets, strict=True):
            _bars(panel, results, kind, budget)
            gaps = first.of_budget(budget)
            time = TimeAxis.timesteps(gaps[-1].stop) if time is None else time
            labels = [time.words(gap.start, gap.stop) for gap in gaps]
            panel.set_xticks(range(len(gaps)), labels, fontsize=8)
    # Titles on the top row and timesteps on the bottom row only: panels share their axes.
    for panel, budget in zip(panels[0], first.budgets, strict=True):
        same = _SAME.get(budget, budget)
        panel.set_title(f"specialists matched by {budget}: {same}", fontsize=9)
    for panel in panels[-1]:
        unit = "timesteps" if time is None else time.unit
        panel.set_xlabel(f"{unit} of the interval (right: more noise)")
    if len(results) > 1:
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(results), fontsize=8)
    return figure


def _bars(panel: Axes, results: Mapping[str, TransferGapResult], kind: str, budget: str) -> None:
    width = 0.8 / len(results)
    colors = colormaps["viridis"](np.linspace(0.1, 0.9, len(results)))
    for place, (name, result) in enumerate(results.items()):
        gaps = result.of_budget(budget)
        if kind == "loss":
            estimates = 100 * np.array([gap.relative_loss_gap for gap in gaps])
        else:
            estimates = np.array([gap.fid_gap for gap in gaps])
        middle, low, high = estimates.T
        at = np.arange(len(gaps)) + (place - (len(results) - 1) / 2) * width
        panel.bar(at, middle, width, color=colors[place], label=name)
        # Without resamples the ends are NaN: no error bar.
        errors = np.nan_to_num(np.stack([middle - low, high - middle])).clip(min=0)
        panel.errorbar(at, middle, errors, fmt="none", ecolor="0.25", elinewidth=1, capsize=2)
    panel.axhline(0, color="0.2", linewidth=0.9)
    panel.grid(alpha=0.3, axis="y")
