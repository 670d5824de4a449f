"""Pictures of image quality over training: each metric with what it is to be read against."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

__all__ = ["quality_history"]

_DISTANCES = {
    "fid": ("to held-out images", "tab:blue", "o-"),
    "fid_train": ("to training images", "tab:orange", "o-"),
    "fid_real": ("real against real", "0.4", "--"),
}
_COVERAGE = {
    "precision": ("precision: look real", "tab:blue", "o-"),
    "recall": ("recall: cover the real", "tab:orange", "o-"),
    "class_agreement": ("class is the one asked for", "tab:green", "o-"),
}
_NEAREST = {
    "nearest_train_median": ("generated", "tab:blue", "o-"),
    "nearest_train_real_median": ("held-out", "0.4", "--"),
}


def quality_history(steps: Sequence[int], scores: Sequence[Mapping[str, float]]) -> Figure:
    """FID, precision and recall, and distance to the training images, over training.

    Args:
        steps: Optimizer steps of the measurements.
        scores: What `GenerationScores` gave at each.
    """
    panels = [
        ("FID (lower is better)", _DISTANCES),
        ("share of images (higher is better)", _COVERAGE),
        ("distance to the nearest training image", _NEAREST),
    ]
    shown = [panel for panel in panels if any(name in scores[-1] for name in panel[1])]
    figure = Figure(figsize=(3.6 * len(shown), 3.4), dpi=110, layout="constrained")
    for axis, (title, lines) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
    ):
        _lines(axis, steps, scores, lines)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    num_images = scores[-1].get("num_images", 0)
    figure.suptitle(f"n = {num_images:.0f} generated images", fontsize=9)
    return figure


def _lines(
    axis: Axes,
    steps: Sequence[int],
    scores: Sequence[Mapping[str, float]],
    lines: Mapping[str, tuple[str, str, str]],
) -> None:
    highest = 0.0
    for name, (label, color, style) in lines.items():
        if name not in scores[-1]:
            continue
        values = [row.get(name, float("nan")) for row in scores]
        if style == "--":  # the yardstick hardly moves: one level, also for a single measurement
            axis.axhline(values[-1], linestyle=style, color=color, label=label)
        else:
            axis.plot(steps, values, style, color=color, markersize=4, label=label)
        highest = max(highest, *values)
    positive = [v for row in scores for k, v in row.items() if k in lines and v > 0]
    if positive and highest > 20 * min(positive):
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, 1.08 * highest or 1.0)
