"""The picture of `docs/processes.md`: clusterings and densities of each process, over log-SNR.

Run: `python -m studies.process_figure docs/images/processes.png`, some minutes on one core. For the
clusters by gradients, one small DiT is trained on the 8x8 digits under each process, from the same
first weights and with one seed, and its task affinity is measured. The measured affinities stay in
`runs/process_figure`: with them there, the picture is drawn anew in seconds.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from ant_lightning import (
    EDM,
    CosineSchedule,
    DigitsData,
    DiscreteDiffusion,
    DiT,
    DiTModule,
    EDMPreconditioning,
    FlowMatching,
    GradientClustering,
    LogitNormal,
    NoiseProcess,
    Optimization,
    SNRClustering,
    TaskAffinity,
    Tasks,
    TimestepClustering,
)
from ant_lightning.files.atomic import write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ant_lightning import Clustering

K = 5
NUM_STEPS, NUM_CELLS, NUM_IMAGES = 600, 40, 512
PROCESSES: dict[str, NoiseProcess] = {
    "DDPM, linear": DiscreteDiffusion(),
    "DDPM, cosine": DiscreteDiffusion(CosineSchedule(1000)),
    "flow, uniform": FlowMatching(),
    "flow, logit-normal": FlowMatching(density=LogitNormal()),
    "EDM, log-normal": EDM(preconditioning=EDMPreconditioning(sigma_data=0.75)),
}


def measured_affinity(process: NoiseProcess, file: Path) -> None:
    """Train a DiT of 0.15M parameters under this process; write its affinity to `file`."""
    L.seed_everything(0, verbose=False)  # the same weights, images and noise for all processes
    network = DiT(
        input_size=8, patch_size=2, in_channels=1, hidden_size=48, depth=3, num_heads=4,
        num_classes=10, learn_sigma=False,
    )  # fmt: skip
    module = DiTModule(
        network,
        process=process,
        tasks=Tasks(SNRClustering(K)),  # without a balancer: the plain mean
        optimization=Optimization(
            lambda groups: torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.0), warmup_steps=50
        ),
        seed=0,
    )
    data = DigitsData(batch_size=64)
    trainer(file.parent, max_steps=NUM_STEPS, limit_val_batches=0).fit(module, data)
    measure = TaskAffinity(num_points=NUM_CELLS, num_images=NUM_IMAGES, weights="live")
    validation = trainer(file.parent, callbacks=[measure], limit_val_batches=1)
    validation.validate(module, data, verbose=False)
    assert measure.result is not None
    reliability = float(measure.result.reliability.min())
    print(f"{file.stem}: lowest reliability {reliability:.2f}", flush=True)
    measure.result.save(file)


def trainer(folder: Path, **settings: Any) -> L.Trainer:
    """A trainer that writes nothing but the measurement."""
    return L.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, default_root_dir=folder,
        num_sanity_val_steps=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip


def draw(panel: Axes, process: NoiseProcess, clusterings: dict[str, Clustering]) -> None:
    """The density of a process, and clusters with their shares of the draws, over log-SNR."""
    times = torch.as_tensor(process.edges[1:-1])
    discrete = isinstance(process, DiscreteDiffusion)
    inner = process.log_snr_at(times.long() if discrete else times).numpy()
    centres = process.log_snr.numpy()
    edges = np.concatenate([centres[:1], inner, centres[-1:]])
    density = process.density.numpy() / np.abs(np.diff(edges)).clip(1e-9)
    panel.plot(centres[1:-1], density[1:-1] / density[1:-1].max() * 3, color="0.2", lw=1)
    colors = colormaps["viridis"](np.linspace(0.1, 0.95, K))
    for row, clustering in enumerate(clusterings.values(), start=1):
        clusters = clustering.with_density(process.density)(process.log_snr)
        shares = clusters.masses(process.density).tolist()
        for task, (start, stop) in enumerate(pairwise(clusters.boundaries)):
            left, right = edges[start], edges[stop]
            panel.barh(-row, right - left, left=left, color=colors[task], edgecolor="w")
            middle = (max(min(left, right), -16) + min(max(left, right), 16)) / 2
            share = f"{shares[task]:.0%}" if shares[task] >= 0.005 else "<1%"
            panel.text(
                middle, -row, share, color="w" if task < K - 2 else "k",
                ha="center", va="center", fontsize=7,
            )  # fmt: skip
    panel.set_yticks([1.5, *range(-1, -1 - len(clusterings), -1)], ["draws", *clusterings])
    panel.tick_params(axis="y", labelsize=8, length=0)
    panel.set(xlim=(16, -16), ylim=(-0.6 - len(clusterings), 3.3))


def figure(folder: Path) -> Figure:
    """One row for each process; affinities that `folder` lacks are measured first."""
    page = Figure(figsize=(9, 12.5), dpi=110, layout="constrained")
    panels = page.subplots(len(PROCESSES), 1, sharex=True)
    for panel, (title, process) in zip(panels, PROCESSES.items(), strict=True):
        file = folder / f"{title.replace(', ', '_')}.safetensors"
        if not file.exists():
            measured_affinity(process, file)
        clusterings: dict[str, Clustering] = {
            "timestep": TimestepClustering(K),
            "SNR": SNRClustering(K),
            "SNR, weighted": SNRClustering(K, weighted=True),
            "gradients": GradientClustering(file, K),
        }
        draw(panel, process, clusterings)
        panel.set_title(title, fontsize=11)
    page.suptitle("Where the five tasks of each clustering lie; %: share of the draws", fontsize=12)
    panels[-1].set_xlabel("log-SNR (noise grows to the right); line: draws per unit of log-SNR")
    return page


if __name__ == "__main__":
    results = Path("runs/process_figure")
    results.mkdir(parents=True, exist_ok=True)
    write_figure(Path(sys.argv[1]), figure(results))
