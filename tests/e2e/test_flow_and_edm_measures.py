"""Affinity, transfer, gap, reclustering, conflict, report and dashboard on flow and EDM."""

import json
from itertools import pairwise
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from ant_lightning import (
    EDM,
    EMA,
    AffinityResult,
    Checkpoints,
    DigitsData,
    DigitsFeatures,
    DiscreteDiffusion,
    DiT,
    DiTModule,
    EDMSampler,
    FlowMatching,
    GradientClustering,
    LogitNormal,
    NegativeTransferGap,
    ODESampler,
    Sampling,
    SNRClustering,
    Tasks,
    TimestepClustering,
    TimestepSampling,
)
from ant_lightning.cli.parser import run
from ant_lightning.cli.report import write_report
from ant_lightning.tasks.figure import boundaries_figure, clusterings_figure, importance_density
from ant_lightning.tasks.time_axis import TimeAxis

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
UNITS = {"sit": "t (0 data, 1 noise)", "edm": "sigma"}
MEASURES = """
trainer:
  callbacks:
    - class_path: ant_lightning.ConflictMonitor
      init_args: {log_every_n_steps: 1, probe_every_n_steps: 1}
    - class_path: ant_lightning.TaskAffinity
      init_args: {num_points: 4, num_images: 8}
    - class_path: ant_lightning.TransferMatrix
      init_args: {num_images: 16}
    - class_path: ant_lightning.Reclustering
      init_args: {recluster_every: 1, num_points: 6, num_images: 8}
    - class_path: ant_lightning.SampleGrid
      init_args: {num_images: 4}
    - class_path: ant_lightning.Dashboard
"""


@pytest.fixture(scope="module", params=["sit", pytest.param("edm", marks=pytest.mark.slow)])
def measured(request, tmp_path_factory):
    """Three steps of a shipped config with everything that measures; its log folder."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "measures.yaml").write_text(MEASURES)
    files = (f"digits/{request.param}", "balancer/pcgrad", "clustering/snr")
    configs = [*(CONFIGS / f"{file}.yaml" for file in files), folder / "measures.yaml"]
    args = [each for path in configs for each in ("--config", str(path))]
    args += [
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=3",
        "--trainer.limit_val_batches=1",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.accelerator=cpu",
        "--data.batch_size=20",
        "--model.backbone.hidden_size=16",
        "--model.backbone.depth=1",
        "--model.sampling.sampler.num_steps=2",
        f"--trainer.logger.save_dir={folder}",
    ]
    cli = run(["fit", *args])
    return request.param, cli, Path(cli.trainer.log_dir)


def test_everything_that_measures_runs_and_is_drawn(measured):
    _, cli, folder = measured
    assert cli.trainer.global_step == 3
    affinity = AffinityResult.load(folder / "task_affinity.safetensors")
    assert affinity.num_timesteps == cli.model.process.num_timesteps
    assert bool(affinity.plain.isfinite().all())
    # Measured on this process: it clusters on it, and is refused on another.
    file = folder / "task_affinity.safetensors"
    assert GradientClustering(file, 3)(cli.model.process.log_snr).num_tasks == 3
    matrices = [c.matrix for c in cli.trainer.callbacks if hasattr(c, "matrix")]
    assert matrices[0].shape == (5, 5)
    assert bool(matrices[0].isfinite().all())
    assert len(cli.model.cluster_history) > 1
    pictures = {path.name for path in folder.glob("*.png")}
    assert "0_page_overview.png" in pictures
    wanted = {
        "3_tasks_losses_and_weights.png",
        "4_conflict_gradient_cosines.png",
        "5_affinity_by_timestep.png",
        "5_affinity_by_log_snr.png",
        "5_affinity_by_distance.png",
        "5_affinity_clusters.png",
        "6_transfer_lookahead.png",
    }
    assert wanted <= pictures, pictures


def test_the_report_has_the_time_of_the_process(measured):
    name, cli, folder = measured
    text = write_report(folder).read_text()
    assert f"| task | cells | {UNITS[name]} | log-SNR |" in text
    edges, boundaries = cli.model.process.edges, cli.model.clusters.boundaries
    for start, stop in pairwise(boundaries):
        assert f"| {start}-{stop - 1} | {edges[start]:.2g} to {edges[stop]:.2g} |" in text
    assert f"| process | {type(cli.model.process).__name__}" in text.replace("ant_lightning.", "")
    for figure in ("clusters", "affinity", "affinity_by_time", "curves"):
        assert imread(folder / f"report_{figure}.png").min() < 0.5


PROCESSES = {
    "flow": (lambda: FlowMatching(density=LogitNormal(), num_timesteps=60), ODESampler),
    "edm": (lambda: EDM(num_timesteps=60), EDMSampler),
}


def module(name, interval=None):
    torch.manual_seed(0)
    process, sampler = PROCESSES[name]
    network = DiT(
        input_size=8,
        patch_size=4,
        in_channels=1,
        hidden_size=8,
        depth=1,
        num_heads=1,
        num_classes=10,
        learn_sigma=False,
    )
    return DiTModule(
        network,
        process=process(),
        tasks=Tasks(SNRClustering(num_tasks=2)),
        timesteps=TimestepSampling(interval=interval),
        sampling=Sampling(sampler(num_steps=4)),
        seed=0,
    )


def trainer(folder, *callbacks):
    return L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        callbacks=[EMA(decay=0.5), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, Checkpoints) for each in callbacks),
        num_sanity_val_steps=0,
        limit_val_batches=1,
        default_root_dir=folder,
    )


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_the_gap_of_losses_and_of_fid(name, tmp_path):
    clusters = module(name).clusters
    intervals = list(pairwise(clusters.boundaries))
    paths = []
    for i, interval in enumerate([None, *intervals]):
        place = tmp_path / str(i)
        run_ = trainer(place, Checkpoints(dirpath=place, at_steps=[2]))
        run_.fit(module(name, interval), DigitsData(batch_size=16, seed=0))
        paths.append(str(place / "step_2.ckpt"))
    gap = NegativeTransferGap(
        by_iterations=paths[1:],
        extractor=DigitsFeatures(),
        num_images=8,
        num_held_out=8,
        num_draws=2,
        num_resamples=4,
    )
    evaluation = trainer(tmp_path, gap)
    evaluation.validate(
        module(name),
        DigitsData(batch_size=16, seed=0),
        ckpt_path=paths[0],
        verbose=False,
        weights_only=True,
    )
    found = gap.result.of_budget("iterations")
    assert [(each.start, each.stop) for each in found] == intervals
    assert all(np.isfinite([each.loss_gap.value, each.fid_gap.value]).all() for each in found)
    assert any(each.loss_gap.value != 0 for each in found)
    rows = next(iter(tmp_path.rglob("negative_transfer_gap.jsonl"))).read_text().splitlines()
    assert json.loads(rows[-1])["gaps"]


def test_axes_are_those_of_the_process():
    for process, label, log in (
        (DiscreteDiffusion(), "timestep", False),
        (FlowMatching(num_timesteps=100), "t (0 data, 1 noise)", False),
        (EDM(num_timesteps=100), "sigma", True),
    ):
        clusters = TimestepClustering(4)(process.log_snr)
        time = TimeAxis.of(process)
        page = clusterings_figure(
            {"timestep": clusters}, process.log_snr, time=time, density=process.density
        )
        intervals, _, draws, by_snr = page.axes
        assert draws.get_xlabel() == label
        assert by_snr.get_xlabel() == "log-SNR"
        assert draws.get_xscale() == ("log" if log else "linear")
        assert draws.get_xlim() == pytest.approx(process.edges[[0, -1]].tolist())
        # The bars are the clusters, at their times.
        lefts = [bar.get_x() for bar in intervals.patches]
        assert lefts == pytest.approx(process.edges[list(clusters.boundaries[:-1])].tolist())
        # The own density is drawn beside what the clusters make of it.
        drawn, own = (each.get_data().values for each in draws.patches)
        np.testing.assert_allclose(own, process.density * process.num_timesteps)
        shares = np.add.reduceat(drawn, list(clusters.boundaries[:-1])) / process.num_timesteps
        np.testing.assert_allclose(shares, 1 / 4)
        history = boundaries_figure(
            [(0, clusters.boundaries)], process.log_snr, last_step=5, time=time
        )
        assert [panel.get_ylabel() for panel in history.axes] == [label, "log-SNR"]
        assert history.axes[0].get_yscale() == ("log" if log else "linear")


def test_importance_under_a_density_is_how_often_cells_are_drawn():
    process = FlowMatching(density=LogitNormal(0.5, 0.8), num_timesteps=20)
    clusters = SNRClustering(3)(process.log_snr)
    generator = torch.Generator().manual_seed(0)
    cells, _ = clusters.sample(200_000, generator=generator, density=process.density)
    counts = np.bincount(cells, minlength=20) / 200_000 * 20
    expected = importance_density(clusters, process.density)
    # Within five standard deviations of a count.
    assert (abs(counts - expected) < 5 * np.sqrt(20 * expected / 200_000) + 1e-3).all()
