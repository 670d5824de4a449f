"""Pictures of task affinity: heat maps over both noise axes, and affinity against distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from ant_lightning.affinity.curves import affinity_by_distance, distance_correlation
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from torch import Tensor

    from ant_lightning.affinity.result import AffinityResult

__all__ = ["NoiseAxis", "affinity_curves", "affinity_heat_maps"]

NoiseAxis = Literal["timestep", "log_snr"]
_NAMES = {"timestep": "timestep", "log_snr": "log-SNR"}
_RELIABLE = 0.8


def affinity_heat_maps(result: AffinityResult, *, axis: NoiseAxis = "timestep") -> Figure:
    """Plain and corrected affinity as heat maps, and below them the reliability of each gradient.

    Blue is conflict (-1), white 0, red agreement (1). Entries of the corrected map that have no
    estimate are grey.

    Args:
        result: What was measured.
        axis: `timestep`, or `log_snr` for cells as wide as the log-SNR that they cover.

    Raises:
        ConfigError: If the log-SNR is wanted and the result has none.
    """
    figure = Figure(figsize=(9.4, 5.6), dpi=110, layout="constrained")
    top, bottom = figure.subplots(2, 2, height_ratios=[4, 1], sharex=True)
    edges = _edges_within_schedule(result, axis)
    maps = {
        "plain: cosine of the mean gradients": result.plain,
        "corrected for the noise of the gradients": result.corrected,
    }
    name = _NAMES[axis]
    mesh = None
    for panel, (title, values) in zip(top, maps.items(), strict=True):
        panel.set_facecolor("0.8")
        mesh = panel.pcolormesh(edges, edges, values.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        panel.set_title(title, fontsize=9)
        panel.set_ylabel(name)
        panel.set_box_aspect(1)
        if axis == "timestep":
            panel.invert_yaxis()
    figure.colorbar(mesh, ax=top, label="task affinity", shrink=0.9)  # type: ignore[arg-type]
    for panel in bottom:
        panel.stairs(result.reliability.numpy(), edges, color="tab:green", linewidth=1.2)
        panel.axhline(_RELIABLE, color="0.4", linestyle="--", linewidth=0.8)
        panel.set(xlabel=name, ylabel="reliability", ylim=(-0.05, 1.05))
        panel.grid(alpha=0.3)
        panel.label_outer()
    if axis == "log_snr":  # noise grows to the right and downwards, as over timesteps
        bottom[0].invert_xaxis()  # the other panels share it
    figure.suptitle(_caption(result), fontsize=9)
    return figure


def affinity_curves(result: AffinityResult, *, num_bins: int = 20) -> Figure:
    """Mean affinity against the distance of timesteps and (if known) of log-SNRs.

    Bands are one standard deviation over the pairs of a bin; the legend has Spearman's rank
    correlation of the pairs with its bootstrap interval.
    """
    axes: tuple[NoiseAxis, ...] = ("timestep",)
    if result.log_snr is not None:
        axes = ("timestep", "log_snr")
    figure = Figure(figsize=(4.7 * len(axes), 3.8), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    lowest = 0.0
    for panel, axis in zip(panels, axes, strict=True):
        positions = _positions(result, axis)
        for label, values, color in (
            ("plain", result.plain, "tab:blue"),
            ("corrected", result.corrected, "tab:orange"),
        ):
            if bool(values.triu(diagonal=1).nan_to_num().any()):
                low = _curve(panel, values, positions, label=label, color=color, num_bins=num_bins)
                lowest = min(lowest, low)
        panel.axhline(0, color="0.4", linewidth=0.8)
        panel.set_xlabel(f"|difference of {_NAMES[axis]}|")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="upper right")
    panels[0].set_ylabel("mean task affinity")
    # Corrected estimates of mere noise go far beyond ±1.
    panels[0].set_ylim(max(-1.05, lowest - 0.1), 1.05)
    figure.suptitle(_caption(result), fontsize=9)
    return figure


def cell_edges(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges `[n + 1]` of cells around increasing or decreasing positions `[n]`."""
    if len(positions) == 1:
        return np.array([positions[0] - 0.5, positions[0] + 0.5])
    middles = (positions[1:] + positions[:-1]) / 2
    first, last = 2 * positions[0] - middles[0], 2 * positions[-1] - middles[-1]
    return np.concatenate([[first], middles, [last]])


def _edges_within_schedule(result: AffinityResult, axis: NoiseAxis) -> NDArray[np.float64]:
    """Cells around the grid, of which the first and the last end with the schedule."""
    edges = cell_edges(_positions(result, axis).numpy())
    if axis == "timestep":
        return edges.clip(0, result.num_timesteps)
    whole = result.log_snr
    return edges if whole is None else edges.clip(float(whole.min()), float(whole.max()))


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
        raise ConfigError("axis: 'log_snr' needs a result with log_snr, found one without")
    return result.grid_log_snr


def _caption(result: AffinityResult) -> str:
    times = (
        "1 checkpoint" if result.num_checkpoints == 1 else f"{result.num_checkpoints} checkpoints"
    )
    how = "exact" if result.sketch_dim is None else f"sketched to {result.sketch_dim}"
    what = f"{result.model}: " if result.model else ""
    return f"{what}{len(result.timesteps)} timesteps, {times}, {how}"
