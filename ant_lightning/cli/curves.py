"""The curves of a run from TensorBoard's event files, as numbers and as one figure."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event

from ant_lightning.callbacks.axes_style import plain_log_axis, task_colors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from matplotlib.axes import Axes

Curve = list[tuple[int, float]]
# Title of a panel and the curves in it.
_PANELS = {
    "loss": r"(train|val)/loss",
    "loss of each task (training)": r"train/task_\d+/loss",
    "loss of each task (held out)": r"val/task_\d+/loss",
    "effective weight of each task": r"train/task_\d+/weight",
    "FID": r"val/fid(_real|_train)?",
    "gradient": r"train/grad_norm",
    "share of conflicting pairs of tasks": r"train/conflicting_pairs",
}
_MARKERS = "osD^vPX"


def read_curves(folder: Path) -> dict[str, Curve]:
    """Every scalar of the event files in a folder, `[(step, value), ...]` in the order of steps.

    If a step was logged more than once, as by a resumed run, its last value is kept.
    """
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.out.tfevents*")):
        for event in _events(path):
            for value in event.summary.value:
                if value.HasField("simple_value"):  # as torch's SummaryWriter writes numbers
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return {name: sorted(points.items()) for name, points in found.items()}


def _events(path: Path) -> Iterator[Event]:
    """The events of a file up to its end, or to a record that is damaged or still being written.

    A record is its length in 8 bytes, a checksum in 4, the data, a checksum in 4. TensorBoard's
    own reader takes 0.5 s to import.
    """
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            (length,) = struct.unpack("<Q", head[:8])
            if length > path.stat().st_size or len(data := file.read(length + 4)) < length + 4:
                return
            try:
                event = Event.FromString(data[:-4])
            except Exception:  # DecodeError of protobuf, which comes with TensorBoard
                return
            yield event


def curves_figure(curves: Mapping[str, Curve]) -> Figure | None:
    """A panel for each entry of `_PANELS` that has curves; `None` if no entry has."""
    by_number = sorted(curves, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    chosen = {
        title: [name for name in by_number if re.fullmatch(pattern, name)]
        for title, pattern in _PANELS.items()
    }
    shown = {title: names for title, names in chosen.items() if names}
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4 * columns, 3.1 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for axis, (title, names) in zip(axes, shown.items(), strict=False):
        once = {step for name in names for step, _ in curves[name]}
        heading = title
        if len(once) == 1:
            heading += f"\none measurement, at step {once.pop()}"
            _draw_points(axis, {name: curves[name][0][1] for name in names})
        else:
            _draw_lines(axis, {name: curves[name] for name in names})
        drawn = [value for name in names for _, value in curves[name]]
        if "conflicting" in title:  # a share
            axis.set_ylim(0, 1)
        elif min(drawn) > 0:
            plain_log_axis(axis, drawn)
        axis.set_title(heading, fontsize=9)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.3, which="both")
    return figure


def _draw_lines(axis: Axes, curves: Mapping[str, Curve]) -> None:
    """Lines over the steps; few points have a marker for each curve, larger for those below."""
    for place, (name, color) in enumerate(zip(curves, task_colors(len(curves)), strict=True)):
        steps, values = zip(*curves[name], strict=True)
        few = len(steps) < 20
        axis.plot(
            steps,
            values,
            marker=_MARKERS[place % len(_MARKERS)] if few else "",
            markersize=3 if len(steps) > 2 else 7 - 3 * place / len(curves),
            label=name.split("/")[1].replace("_", " ") if "task_" in name else name,
            color=color,
        )
    axis.set_xlabel("optimizer step", fontsize=8)
    axis.legend(fontsize=6, framealpha=0.6)


def _draw_points(axis: Axes, values: Mapping[str, float]) -> None:
    """A value for each name, side by side: over the steps they would lie on each other."""
    of_tasks = all("task_" in name for name in values)
    axis.scatter(range(len(values)), list(values.values()), s=20, color=task_colors(len(values)))
    labels = [re.findall(r"\d+", name)[0] if of_tasks else name for name in values]
    axis.set_xticks(range(len(values)), labels)
    axis.set_xlim(-0.5, len(values) - 0.5)
    axis.set_xlabel("task" if of_tasks else "", fontsize=8)
