"""Bars of the negative-transfer gap: intervals of timesteps, and models beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from ant_lightning.transfer.gap import GapEstimate
    from ant_lightning.transfer.result import TransferGapResult

__all__ = ["transfer_gap_bars"]

_SAME = {"iterations": "as many steps", "samples": "as many images of the interval"}


def transfer_gap_bars(results: Mapping[str, TransferGapResult]) -> Figure:
    """A panel for each gap and budget, a group of bars for each interval, a bar for each model.

    The loss gap is in per cent of the multi-task model's loss in the interval, so that intervals
    share an axis. Lines are the bootstrap intervals.

    Args:
        results: By the name of the multi-task model; all with the same intervals and budgets.
    """
    first = next(iter(results.values()))
    rows = ["loss", "fid"] if first.num_images else ["loss"]
    figure = Figure(
        figsize=(1 + 4.6 * len(first.budgets), 0.8 + 2.7 * len(rows)), dpi=110, layout="constrained"
    )
    panels = figure.subplots(
        len(rows), len(first.budgets), squeeze=False, sharex=True, sharey="row"
    )
    for i, kind in enumerate(rows):
        for j, budget in enumerate(first.budgets):
            axis = panels[i, j]
            _panel(axis, results, kind, budget)
            if i == 0:
                same = _SAME.get(budget, budget)
                axis.set_title(f"specialists matched by {budget}: {same}", fontsize=9)
            if j == 0:
                label = "loss gap, % of the loss" if kind == "loss" else "FID gap"
                axis.set_ylabel(f"{label}\n(below 0: negative transfer)", fontsize=9)
    for axis in panels[-1]:
        axis.set_xlabel("timesteps of the interval (right: more noise)")
    if len(results) > 1:
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(results), fontsize=8)
    return figure


def _panel(axis: Axes, results: Mapping[str, TransferGapResult], kind: str, budget: str) -> None:
    width = 0.8 / len(results)
    colors = colormaps["viridis"](np.linspace(0.1, 0.9, len(results)))
    labels: Sequence[str] = []
    for place, (name, result) in enumerate(results.items()):
        gaps = result.of_budget(budget)
        if kind == "loss":
            shown = [_scaled(gap.relative_loss_gap, 100) for gap in gaps]
        else:
            shown = [_scaled(gap.fid_gap, 1) for gap in gaps]
        middle, low, high = (np.array(each) for each in zip(*shown, strict=True))
        at = np.arange(len(gaps)) + (place - (len(results) - 1) / 2) * width
        axis.bar(at, middle, width, color=colors[place], label=name)
        errors = np.nan_to_num(np.stack([middle - low, high - middle])).clip(min=0)
        axis.errorbar(at, middle, errors, fmt="none", ecolor="0.25", elinewidth=1, capsize=2)
        labels = [f"{gap.start}-{gap.stop - 1}" for gap in gaps]
    axis.axhline(0, color="0.2", linewidth=0.9)
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    axis.grid(alpha=0.3, axis="y")


def _scaled(gap: GapEstimate, factor: float) -> tuple[float, float, float]:
    return gap.value * factor, gap.low * factor, gap.high * factor
