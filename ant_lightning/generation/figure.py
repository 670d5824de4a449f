"""Figure of image quality over training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping

# Panel -> score -> label, colour and style. Dashed lines are references for the others.
_PANELS = {
    "FID (lower is better)": {
        "fid": ("to held-out images", "tab:blue", "o-"),
        "fid_train": ("to training images", "tab:orange", "s-"),
        "fid_real": ("real against real", "0.4", "--"),
    },
    "share of images (higher is better)": {
        "precision": ("precision: look real", "tab:blue", "o-"),
        "recall": ("recall: cover the real", "tab:orange", "s-"),
        "class_agreement": ("class is the one asked for", "tab:green", "^-"),
    },
    "distance to the nearest training image": {
        "nearest_train_median": ("generated", "tab:blue", "o-"),
        "nearest_train_real_median": ("held-out", "0.4", "--"),
    },
}


def quality_history(history: Mapping[int, Mapping[str, float]], *, network: str = "") -> Figure:
    """FID, precision and recall, and distance to the training images, over training.

    Args:
        history: Results of `GenerationScores`, by the optimizer step of the measurement.
        network: What the features are of, if that is not Inception.
    """
    steps = sorted(history)
    last = history[steps[-1]]
    shown = {title: lines for title, lines in _PANELS.items() if lines.keys() & last.keys()}
    figure = Figure(figsize=(3.6 * len(shown), 3.4), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (title, lines) in zip(panels, shown.items(), strict=True):
        drawn: list[float] = []
        for name, (label, color, style) in lines.items():
            if name not in last:
                continue
            values = [history[step].get(name, float("nan")) for step in steps]
            if style == "--":  # a reference hardly changes: its last value as a line
                axis.axhline(values[-1], linestyle=style, color=color, label=label)
            else:
                axis.plot(steps, values, style, color=color, markersize=4, label=label)
            drawn += values
        # On a linear axis one value 20 times the others would flatten them.
        positive = [value for value in drawn if value > 0]
        if positive and max(positive) > 20 * min(positive):
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.08 * max(positive, default=0) or 1.0)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("optimizer step")
        if len(steps) <= 2:  # no ticks between them, as if there had been more
            axis.set_xticks(steps)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    once = ", one measurement" if len(steps) == 1 else ""
    of = f", features of {network}" if network else ""
    title = f"n = {last.get('num_images', 0):.0f} generated images{of}{once}"
    figure.suptitle(title, fontsize=9)
    return figure
