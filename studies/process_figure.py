"""The picture of `docs/processes.md`: clusterings and densities of each process, over log-SNR.

Run: `python -m studies.process_figure docs/images/processes.png`.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from ant_lightning import (
    EDM,
    CosineSchedule,
    DiscreteDiffusion,
    FlowMatching,
    LogitNormal,
    NoiseProcess,
    SNRClustering,
    TimestepClustering,
)

PROCESSES: dict[str, NoiseProcess] = {
    "DDPM, linear": DiscreteDiffusion(),
    "DDPM, cosine": DiscreteDiffusion(CosineSchedule(1000)),
    "flow, uniform": FlowMatching(),
    "flow, logit-normal": FlowMatching(density=LogitNormal()),
    "EDM, log-normal": EDM(),
}
CLUSTERINGS = {
    "timestep": TimestepClustering(5),
    "SNR": SNRClustering(5),
    "SNR, weighted": SNRClustering(5, weighted=True),
}


def figure() -> Figure:
    """One row for each process: its density and its clusters over log-SNR."""
    page = Figure(figsize=(9, 10), dpi=110, layout="constrained")
    panels = page.subplots(len(PROCESSES), 1, sharex=True)
    colors = colormaps["viridis"](np.linspace(0.1, 0.95, 5))
    for panel, (title, process) in zip(panels, PROCESSES.items(), strict=True):
        times = torch.as_tensor(process.edges[1:-1])
        inner = process.log_snr_at(times.long() if "DDPM" in title else times).numpy()
        centres = process.log_snr.numpy()
        edges = np.concatenate([centres[:1], inner, centres[-1:]])
        widths = np.abs(np.diff(edges)).clip(1e-9)
        density = process.density.numpy() / widths
        panel.plot(centres[1:-1], density[1:-1] / density[1:-1].max() * 3, color="0.2", lw=1)
        for row, clustering in enumerate(CLUSTERINGS.values()):
            clusters = clustering.with_density(process.density)(process.log_snr)
            for task, (start, stop) in enumerate(pairwise(clusters.boundaries)):
                left, right = edges[start], edges[stop]
                panel.barh(-row - 1, right - left, left=left, color=colors[task], edgecolor="w")
        panel.set(title=title, xlim=(16, -16))
        panel.set_yticks(range(-1, -1 - len(CLUSTERINGS), -1), list(CLUSTERINGS), fontsize=8)
    panels[-1].set_xlabel("log-SNR (noise grows to the right); line: draws per unit of log-SNR")
    return page


if __name__ == "__main__":
    figure().savefig(sys.argv[1])
