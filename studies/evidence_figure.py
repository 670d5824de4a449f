"""Pictures of the evidence study: excess risk against vanilla, and convergence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["convergence_figure", "ratio_figure"]

_PERCENT_TICKS = np.array([-95, -90, -75, -50, -25, -10, 0, 10, 25, 50, 100, 200, 400, 900])


def ratio_figure(
    differences: Mapping[tuple[str, int], tuple[float, float, float, float]], *, title: str
) -> Figure:
    """Change of excess risk by (method, cluster), with intervals, as far for half as for double.

    Args:
        differences: Mean, low and high of the log ratio (and a fourth number that is not drawn).
        title: Of the figure.
    """
    methods = list(dict.fromkeys(method for method, _ in differences))
    num_tasks = 1 + max(task for _, task in differences)
    figure = Figure(
        figsize=(max(6.0, 2.2 + 1.1 * len(methods)), 3.8), dpi=110, layout="constrained"
    )
    axis = figure.subplots()
    colors = colormaps["viridis"](np.linspace(0, 0.9, num_tasks))
    for task in range(num_tasks):
        mean, low, high = np.array([differences[method, task][:3] for method in methods]).T
        place = np.arange(len(methods)) + 0.8 * (task + 0.5) / num_tasks - 0.4
        axis.errorbar(
            place,
            mean,
            yerr=[mean - low, high - mean],
            fmt="o",
            markersize=4,
            capsize=2,
            color=colors[task],
            label=f"cluster {task}",
        )
    axis.axhline(0, color="0.4", linewidth=1)
    low, high = axis.get_ylim()
    places = np.log1p(_PERCENT_TICKS / 100)
    seen = (places >= low) & (places <= high)
    if high - low > 1:
        seen &= abs(_PERCENT_TICKS) != 10  # they would touch
    axis.set_yticks(places[seen], [f"{tick:+d}%" if tick else "0" for tick in _PERCENT_TICKS[seen]])
    axis.set_xticks(range(len(methods)), methods, rotation=20, ha="right", fontsize=8)
    axis.set_ylabel("excess risk against vanilla")
    axis.set_title(f"{title}: below 0 is better; 95% intervals", fontsize=9)
    axis.grid(alpha=0.3, axis="y")
    figure.legend(
        fontsize=7, title="0 is the least noise", title_fontsize=7, loc="outside right upper"
    )
    return figure


def convergence_figure(
    runs: Mapping[str, Sequence[Mapping[str, list[dict[str, Any]]]]], *, title: str
) -> Figure:
    """Excess risk and FID of each method against training images, the mean over seeds.

    Args:
        runs: For each method its runs, `{"excess": rows, "scores": rows}`; the last row of each
            is the final evaluation at more images, which the curves leave out.
        title: Of the figure.
    """
    figure = Figure(figsize=(10, 3.8), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (method, every) in enumerate(runs.items()):
        style: dict[str, Any] = {
            "color": colormaps["tab10"](number),
            "label": method,
            "marker": "o",
        }
        style |= {"markersize": 3, "linewidth": 1.2}
        images = np.array([row["images"] for row in every[0]["excess"][:-1]])
        excess = [[row["mean"]["excess"] for row in run["excess"][:-1]] for run in every]
        fid = [[row["scores"]["fid"] for row in run["scores"][:-1]] for run in every]
        left.plot(images, np.mean(excess, axis=0), **style)
        right.plot(images[-len(fid[0]) :], np.mean(fid, axis=0), **style)
    left.set_ylabel("excess risk, mean over timesteps")
    right.set_ylabel("FID")
    for axis in (left, right):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="minor", labelsize=8)
        axis.set_xlabel("training images")
        axis.grid(alpha=0.3, which="both")
    left.legend(fontsize=7)
    counts = sorted({len(every) for every in runs.values()})
    figure.suptitle(f"{title}: mean of {'-'.join(map(str, counts))} seeds", fontsize=9)
    return figure
