"""Figures of task affinity: heat maps over timesteps or log-SNR, and affinity against distance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure

from ant_lightning.affinity.distance import affinity_by_distance, distance_correlation
from ant_lightning.errors import ConfigError
from ant_lightning.tasks.figure import NOISE_AXES, NoiseAxis, cell_edges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from ant_lightning.affinity.result import AffinityResult
    from ant_lightning.tasks.time_axis import TimeAxis

_RELIABLE = 0.8  # where `AffinityResult.reliability_warning` begins to warn


def affinity_heat_maps(
    result: AffinityResult, *, axis: NoiseAxis = "timestep", time: TimeAxis | None = None
) -> Figure:
    """Plain and corrected affinity as heat maps, and below them the reliability of each gradient.

    Blue is conflict (-1), white 0, red agreement (1). Grey entries of the corrected map have no
    estimate.

    Args:
        result: The measurement.
        axis: `timestep` (or the process' own time), or `log_snr` for cells as wide as the log-SNR
            that they cover.
        time: The process' own time, for the axis `timestep`.

    Raises:
        ConfigError: If `axis` is `log_snr` and the result has no log-SNR.
    """
    figure = Figure(figsize=(9.4, 5.6), dpi=110, layout="constrained")
    top, bottom = figure.subplots(2, 2, height_ratios=[4, 1], sharex=True)
    # `cell_edges` extrapolates the outer cells: cut them at the ends of the schedule.
    limits = (0.0, float(result.num_timesteps))
    if axis == "log_snr" and result.log_snr is not None:
        limits = (float(result.log_snr.min()), float(result.log_snr.max()))
    edges = cell_edges(_positions(result, axis).numpy()).clip(*limits)
    label, log = NOISE_AXES[axis], False
    if axis == "timestep" and time is not None and time.label != "timestep":
        # The grid point c stands for a cell that covers c to c + 1.
        edges, label, log = time.at((edges + 0.5).clip(*limits)), time.label, time.log
    maps = {
        "plain: cosine of the mean gradients": result.plain,
        "corrected for the noise of the gradients (grey: only noise)": result.corrected,
    }
    for panel, (title, values) in zip(top, maps.items(), strict=True):
        mesh = panel.pcolormesh(edges, edges, values.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        panel.set_facecolor("0.8")  # shows where an entry is NaN
        panel.set_title(title, fontsize=9)
        panel.set_ylabel(label)
        panel.set_yscale("log" if log else "linear")
        panel.set_box_aspect(1)
        if axis == "timestep":
            panel.invert_yaxis()  # noise grows downwards, as in a printed matrix
    figure.colorbar(mesh, ax=top, label="task affinity", shrink=0.9)
    for panel in bottom:
        # Without a baseline, as its lines to 0 at both ends would look like values.
        steps = {"baseline": None, "color": "tab:green", "linewidth": 1.2}
        panel.stairs(result.reliability.numpy(), edges, **steps)
        panel.axhline(_RELIABLE, color="0.4", linestyle="--", linewidth=0.8)
        panel.set(xlabel=label, ylabel="reliability", ylim=(-0.05, 1.05))
        panel.set_xscale("log" if log else "linear")
        panel.grid(alpha=0.3)
        panel.label_outer()
    if axis == "log_snr":  # noise grows to the right and downwards, as over timesteps
        bottom[0].invert_xaxis()  # the other panels share it
    figure.suptitle(_caption(result), fontsize=9)
    return figure


def affinity_curves(
    result: AffinityResult, *, num_bins: int = 20, time: TimeAxis | None = None
) -> Figure:
    """Mean affinity against the distance of timesteps and (if known) of log-SNRs.

    Bands are one standard deviation over the pairs of a bin. The legend has Spearman's rank
    correlation over the pairs with its bootstrap interval.

    Args:
        result: The measurement.
        num_bins: Bins of distance.
        time: The process' own time, whose cells are counted; timesteps by default.
    """
    axes = [axis for axis in NOISE_AXES if axis == "timestep" or result.log_snr is not None]
    figure = Figure(figsize=(4.7 * len(axes), 3.8), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    lowest = 0.0
    for panel, axis in zip(panels, axes, strict=True):
        curves = {
            "plain": (result.plain, "tab:blue"),
            "corrected": (result.corrected, "tab:orange"),
        }
        for label, (values, color) in curves.items():
            # `affinity_by_distance` refuses a matrix without a finite pair, and every corrected
            # estimate may be NaN.
            if bool(values.triu(diagonal=1).nan_to_num().any()):
                positions = _positions(result, axis)
                low = _curve(panel, values, positions, label=label, color=color, num_bins=num_bins)
                lowest = min(lowest, low)
        panel.axhline(0, color="0.4", linewidth=0.8)
        label = f"|difference of {NOISE_AXES[axis]}|"
        if axis == "timestep" and time is not None and time.label != "timestep":
            label = f"|difference of cells| (equal steps of {'ln ' * time.log}{time.unit})"
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="upper right")
    # Corrected estimates of gradients that are mostly noise go far beyond ±1: cut the axis.
    panels[0].set(ylabel="mean task affinity", ylim=(max(-1.05, lowest - 0.1), 1.05))
    figure.suptitle(_caption(result), fontsize=9)
    return figure


def _curve(
    panel: Axes, values: Tensor, positions: Tensor, *, label: str, color: str, num_bins: int
) -> float:
    """Draw one curve; returns the lower end of its band."""
    curve = affinity_by_distance(values, positions, num_bins=num_bins)
    rank = distance_correlation(values, positions)
    text = f"{label}: Spearman {rank.estimate:.2f} [{rank.low:.2f}, {rank.high:.2f}]"
    low, high = curve.mean - curve.std, curve.mean + curve.std
    panel.plot(curve.distance, curve.mean, "o-", color=color, markersize=3, label=text)
    panel.fill_between(curve.distance, low, high, color=color, alpha=0.15, linewidth=0)
    return float(low.min())


def _positions(result: AffinityResult, axis: NoiseAxis) -> Tensor:
    if axis == "timestep":
        return torch.tensor(result.timesteps, dtype=torch.float64)
    if result.grid_log_snr is None:
        raise ConfigError("axis: must be timestep for a result without log_snr, found log_snr")
    return result.grid_log_snr


def _caption(result: AffinityResult) -> str:
    checkpoints = f"{result.num_checkpoints} checkpoint{'s' * (result.num_checkpoints > 1)}"
    whole = result.sketch_dim is None
    how = "whole gradients" if whole else f"gradients sketched to {result.sketch_dim} numbers"
    what = f"{result.model}: " if result.model else ""
    return f"{what}{len(result.timesteps)} timesteps, {checkpoints}, {how}"
