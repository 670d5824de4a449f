"""Figure of loss and gradient share over the noise axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from ant_lightning.callbacks.axes_style import plain_log_axis

if TYPE_CHECKING:
    from ant_lightning.diagnosis.findings import Findings


def profile_figure(findings: Findings) -> Figure:
    """Loss, and share of the squared gradient without its noise, by log-SNR."""
    affinity = findings.affinity
    log_snr = affinity.log_snr
    points = list(affinity.timesteps)
    places = points if log_snr is None else log_snr[points].tolist()
    dots = affinity.half_dots.mean(0)
    squares = ((dots[0, 1] + dots[1, 0]) / 2).diagonal().clamp(min=0)
    shares = (100 * squares / squares.sum()).tolist()
    figure = Figure(figsize=(9.6, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(places, findings.losses.tolist(), "o-", markersize=3)
    left.set_ylabel("training loss")
    plain_log_axis(left, findings.losses.tolist())
    right.plot(places, shares, "o-", color="tab:orange", markersize=3)
    right.set_ylabel("% of the squared gradient")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.set_xlabel("timestep" if log_snr is None else "log-SNR (less noise to the left)")
        axis.grid(alpha=0.3)
        for boundary in findings.clusters.boundaries[1:-1]:
            at = float(boundary if log_snr is None else log_snr[boundary])
            axis.axvline(at, color="0.4", linewidth=0.8, linestyle="--")
        if log_snr is not None:
            axis.invert_xaxis()
    return figure
