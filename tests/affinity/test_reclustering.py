"""Clusters that follow the gradients: found, logged, kept in the checkpoint, resumed exactly."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny_digits import T, TinyDiT, module, trainer

from ant_lightning import (
    EMA,
    ConfigError,
    DigitsData,
    DiTModule,
    FlowMatching,
    GradientClustering,
    LogitNormal,
    Reclustering,
    SNRClustering,
    Tasks,
    TimestepClustering,
    TimestepClusters,
    UncertaintyWeighting,
    affinity_costs,
    partition,
)
from ant_lightning.affinity import reclustering as subject


class ThreeGates(TinyDiT):
    """A weight of its own for the timesteps of [0, 20), [20, 70) and [70, 100)."""

    def __init__(self):
        super().__init__()
        self.gates = torch.nn.Parameter(torch.tensor([100.0, 100.0, 100.0]))

    def forward(self, x, timesteps, labels=None):
        group = (timesteps >= 20).long() + (timesteps >= 70).long()
        return torch.cat([self.gates[group].view(-1, 1, 1, 1) * x, 0 * x], 1)


def fit(folder, model, *, steps, ckpt_path=None, every=2, logger=False, **settings):
    callback = Reclustering(recluster_every=every, batch_size=16, **settings)
    run = trainer(folder, callback, EMA(decay=0.5), steps=steps, limit_val_batches=0, logger=logger)
    run.fit(model, DigitsData(batch_size=40), ckpt_path=ckpt_path)
    run.save_checkpoint(folder / f"{steps}.ckpt")
    return folder / f"{steps}.ckpt"


def test_the_intervals_that_share_no_weight_are_found(tmp_path):
    model = module(ThreeGates(), balancer=UncertaintyWeighting(3))
    before = model.clusters.boundaries
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, model, steps=3, num_points=T, num_images=2, logger=logger)
    assert before != (0, 20, 70, T)
    assert model.clusters.boundaries == (0, 20, 70, T)
    assert model.cluster_history == [(0, before), (2, (0, 20, 70, T))]
    assert model.backbone.training
    logger.save()
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("clusters/boundary_2")
    logged = {row[rows[0].index("step")]: row[column] for row in rows[1:] if row[column]}
    assert {step: float(value) for step, value in logged.items()} == {"0": before[2], "2": 70}
    assert (tmp_path / "5_affinity_clusters.png").exists()


def falls_evenly(*_, **settings):
    """Affinity that falls evenly with the distance of two points of the grid."""
    grid = torch.tensor(settings["timesteps"], dtype=torch.float64)
    return SimpleNamespace(
        plain=1 - (grid[:, None] - grid).abs() / T, timesteps=settings["timesteps"]
    )


@pytest.mark.parametrize(
    "start", [SNRClustering, partial(GradientClustering, falls_evenly(timesteps=range(T)).plain)]
)
def test_timesteps_count_by_their_draws_if_they_do_in_the_first_clustering(
    tmp_path, monkeypatch, start
):
    # Only the measurement is replaced: the best partition of this affinity is known.
    monkeypatch.setattr(subject, "task_affinity", falls_evenly)
    affinity = falls_evenly(timesteps=range(T)).plain
    found = {}
    for weighted in (False, True):
        process = FlowMatching(density=LogitNormal(1.0, 0.5), num_timesteps=T)
        tasks = Tasks(start(num_tasks=3, weighted=weighted))
        model = DiTModule(TinyDiT(), process=process, tasks=tasks, seed=0)
        fit(tmp_path, model, steps=2, num_points=T, num_images=2)
        weights = process.density if weighted else None
        best = partition(affinity_costs(affinity, weights=weights), 3)
        assert model.clusters.boundaries == tuple(best)
        assert [step for step, _ in model.cluster_history] == [0, 2]
        found[weighted] = model.clusters.masses(process.density).min()
    assert found[True] > found[False]


@pytest.mark.parametrize("weights", ["live", "ema"])
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path, weights):
    def tiny():
        return module(balancer=UncertaintyWeighting(3))

    probe = {"num_points": 12, "num_images": 6, "weights": weights}
    whole, resumed, evaluated = tiny(), tiny(), tiny()
    one = fit(tmp_path / "whole", whole, steps=5, **probe)
    stopped = fit(tmp_path / "parts", tiny(), steps=3, **probe)
    two = fit(tmp_path / "parts", resumed, steps=5, ckpt_path=stopped, **probe)
    assert [step for step, _ in whole.cluster_history] == [0, 2, 4]
    assert len({boundaries for _, boundaries in whole.cluster_history}) > 1
    one, two = (torch.load(path, weights_only=True) for path in (one, two))
    assert one["ant_lightning"] == two["ant_lightning"]
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    for name, value in one["callbacks"]["EMA"]["averages"].items():
        assert torch.equal(value, two["callbacks"]["EMA"]["averages"][name]), name
    # An evaluation has the clusters of the checkpoint; the settings say what it started with.
    run = trainer(tmp_path, EMA())
    run.validate(evaluated, DigitsData(), ckpt_path=stopped, verbose=False)
    assert evaluated.clusters.boundaries == whole.cluster_history[1][1]
    other = module()
    other.clusters = TimestepClustering(3)(other.process.log_snr)
    other.cluster_history = [(0, other.clusters.boundaries)]
    with pytest.raises(ConfigError, match=r"tasks\.clustering"):
        trainer(tmp_path).validate(other, DigitsData(), ckpt_path=stopped, verbose=False)


def test_a_gradient_that_is_not_finite_leaves_the_clusters(tmp_path, caplog):
    model = module(TinyDiT(nan_from=90), interval=(0, 50))
    before = model.clusters
    fit(tmp_path, model, steps=2, num_points=12, num_images=2)
    assert model.clusters == before
    assert "clusters stay as they are at step 2" in caplog.text
    assert "timestep 90" in caplog.text


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ConfigError, match="recluster_every: must be at least 1"):
        Reclustering(recluster_every=0)
    with pytest.raises(ConfigError, match=r"num_points: must be at least .* tasks 3, found 2"):
        fit(tmp_path, module(), steps=1, num_points=2)
    with pytest.raises(ConfigError, match="num_tasks must stay 3, found 2"):
        module().recluster(TimestepClusters((0, 5, T)))
