"""Axes that a person reads: plain numbers on log axes, and a distinct colour for each task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes


def task_colors(num_tasks: int) -> list[tuple[float, ...]]:
    """Colours that are easy to tell apart; beyond 20 tasks, along a rainbow."""
    if num_tasks <= 10:
        return [tuple(color) for color in colormaps["tab10"](range(num_tasks))]
    if num_tasks <= 20:
        # The ten strong ones first, then their light ones.
        order = [*range(0, 20, 2), *range(1, 20, 2)][:num_tasks]
        return [tuple(color) for color in colormaps["tab20"](order)]
    return [tuple(color) for color in colormaps["turbo"](np.linspace(0.02, 0.98, num_tasks))]


def plain_log_axis(axis: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic if the values are positive, with ticks such as 0.05, 0.1, 0.2."""
    shown = [value for value in values if np.isfinite(value) and value > 0]
    if not shown:
        return
    axis.set_yscale("log")
    ratio = max(shown) / min(shown)
    if ratio < 8:  # within a decade the ticks of a log axis would be one or none
        axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.yaxis.set_minor_locator(NullLocator())
        if ratio < 1.05:  # a line without a range of its own
            axis.set_ylim(0.8 * min(shown), 1.25 * max(shown))
    else:
        subs = (1, 2, 5) if ratio < 1e3 else (1,)
        axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
