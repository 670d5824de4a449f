"""Pictures of what balancers do to the gradients of two parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["gradient_arrows"]


def gradient_arrows(
    gradients: NDArray[np.float64], combined: Mapping[str, NDArray[np.float64]]
) -> Figure:
    """Task gradients `[k, 2]` as thin arrows, what each method makes of them `[2]` as thick ones.

    Shaded is where a step (against the gradient) lowers the loss of every task to first order.
    """
    figure = Figure(figsize=(3.3 * len(combined), 3.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(combined), squeeze=False, sharex=True, sharey=True)[0]
    tips = np.concatenate([gradients, np.stack(list(combined.values())), np.zeros((1, 2))])
    margin = 0.15 * float(np.ptp(tips, axis=0).max())
    (left, low), (right, high) = tips.min(0) - margin, tips.max(0) + margin
    xs, ys = np.linspace(left, right, 201), np.linspace(low, high, 201)
    plane = np.stack(np.meshgrid(xs, ys), -1)
    helps = (plane @ gradients.T > 0).all(-1)
    colors = colormaps["viridis"](np.linspace(0.1, 0.8, len(gradients)))
    for panel, (name, vector) in zip(panels, combined.items(), strict=True):
        panel.contourf(xs, ys, helps, levels=[0.5, 1.5], colors=["tab:green"], alpha=0.15)
        for task, (gradient, color) in enumerate(zip(gradients, colors, strict=True)):
            _arrow(panel, gradient, color, 0.006, f"gradient of task {task}")
        _arrow(panel, vector, "tab:red", 0.013, "update direction")
        products = ", ".join(f"{value:+.2f}" for value in gradients @ vector)
        panel.set_title(f"{name}\ndot products {products}", fontsize=9)
        panel.set_aspect("equal")
        panel.grid(alpha=0.3)
    panels[0].set(xlim=(left, right), ylim=(low, high), ylabel="parameter 2")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=len(labels))
    for panel in panels:
        panel.set_xlabel("parameter 1")
    return figure


def _arrow(
    panel: Axes, vector: NDArray[np.float64], color: object, width: float, label: str
) -> None:
    panel.quiver(
        0,
        0,
        vector[0],
        vector[1],
        color=color,
        width=width,
        label=label,
        angles="xy",
        scale_units="xy",
        scale=1,
        zorder=3,
    )
