"""Picture of image quality over training steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["quality_curves"]

_PANELS = {"fid": "FID (lower is better)", "precision": "precision", "recall": "recall"}


def quality_curves(
    curves: Mapping[str, Mapping[str, tuple[list[int], list[list[float]]]]],
    *,
    title: str,
    real: Mapping[str, float],
) -> Figure:
    """FID, precision and recall of each method over steps: means over seeds, and their range.

    Args:
        curves: By method and metric, steps `[m]` and values of the seeds `[seeds][m]`.
        title: Of the figure.
        real: Scores of real images against others, `fid_real` and the like, drawn as dashed lines.
    """
    figure = Figure(figsize=(11, 3.8), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(_PANELS))
    counts = set()
    for number, (method, metrics) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": colormaps["tab10"](number % 10), "linewidth": 1.4}
        if method == "vanilla":
            style |= {"color": "black", "linewidth": 2.2}
        for axis, metric in zip(panels, _PANELS, strict=True):
            steps, values = metrics[metric]
            counts.add(len(values))
            axis.plot(
                steps, np.mean(values, axis=0), label=method, marker="o", markersize=3, **style
            )
            axis.fill_between(
                steps,
                np.min(values, axis=0),
                np.max(values, axis=0),
                color=style["color"],
                alpha=0.1,
                linewidth=0,
            )
    for axis, (metric, name) in zip(panels, _PANELS.items(), strict=True):
        if f"{metric}_real" in real:
            axis.axhline(
                real[f"{metric}_real"], color="0.4", linestyle="--", label="real images", zorder=0
            )
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("training steps")
        axis.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))  # all nine would overlap
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter("{x:g}")
    panels[0].tick_params(axis="y", which="minor", labelsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    seeds = f"mean and range of {' or '.join(map(str, sorted(counts)))} seeds"
    figure.suptitle(f"{title}: {'one seed' if counts == {1} else seeds}", fontsize=10)
    return figure
