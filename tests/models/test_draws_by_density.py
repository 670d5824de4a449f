"""Cells, times and tasks of a training step under a density, and what is logged of them."""

import math

import pytest
import torch

from ant_lightning import (
    EDM,
    CosineSchedule,
    DiscreteDiffusion,
    FlowMatching,
    LogitNormal,
    LogNormal,
    Mode,
    Shifted,
    ShuffledClustering,
    SizeShifted,
    SNRClustering,
    Table,
    TimestepClusters,
    Uniform,
)
from ant_lightning.errors import ConfigError
from ant_lightning.models.draws import sample_shares

PROCESSES = {
    "logit-normal": lambda: FlowMatching(density=LogitNormal(-0.5, 0.8)),
    "mode": lambda: FlowMatching(density=Mode(1.29)),
    "shifted": lambda: FlowMatching(density=Shifted(LogitNormal(), shift=3.0)),
    "table": lambda: FlowMatching(density=Table([1, 2, 3, 4]), num_timesteps=4),
    "edm": lambda: EDM(density=LogNormal(-0.4, 1.0)),
    "ddpm": lambda: DiscreteDiffusion(CosineSchedule(), density=LogitNormal()),
    "uniform": lambda: FlowMatching(density=Uniform()),
}


def clusters_of(process, *, shuffled=False):
    clustering = SNRClustering(num_tasks=3)
    return (ShuffledClustering(clustering) if shuffled else clustering)(process.log_snr)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("shuffled", [False, True])
def test_cells_are_drawn_by_the_density_inside_a_cluster(name, shuffled):
    process = PROCESSES[name]()
    clusters = clusters_of(process, shuffled=shuffled)
    density, n = process.density, 60_000
    generator = torch.Generator().manual_seed(0)
    drawn = clusters.draw(n, generator=generator, density=density)
    assert torch.equal(clusters.task_of(drawn.cells), drawn.tasks)
    assert drawn.tasks.bincount().tolist() == [n // 3] * 3
    assert bool(((drawn.places >= 0) & (drawn.places < 1)).all())
    task_of = clusters.task_of(torch.arange(process.num_timesteps))
    for task in range(3):
        own = drawn.tasks == task
        wanted = density.where(task_of == task, 0) / density[task_of == task].sum()
        counts = drawn.cells[own].bincount(minlength=process.num_timesteps)
        # Kolmogorov-Smirnov: P(distance > 1.95 / sqrt(n)) = 0.001 for a continuous distribution,
        # less for one of cells.
        distance = (counts.double().cumsum(0) / (n // 3) - wanted.cumsum(0)).abs().max()
        assert float(distance) < 1.95 / math.sqrt(n // 3)
    # Places are uniform inside the cells: the residues of the quantile carry no cell.
    places = drawn.places.sort().values
    assert float((places - torch.arange(n) / n).abs().max()) < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("allocation", ["equal", "proportional"])
def test_counts_are_floor_or_ceiling_of_their_share(name, allocation):
    process = PROCESSES[name]()
    clusters, batch_size, num_batches = clusters_of(process), 17, 2000
    masses = clusters.masses(process.density)
    share = batch_size * (masses if allocation == "proportional" else torch.ones(3) / 3)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(3, dtype=torch.float64)
    for _ in range(num_batches):
        counts = clusters.counts(
            batch_size, generator=generator, allocation=allocation, density=process.density
        )
        assert int(counts.sum()) == batch_size
        assert bool((counts >= (share - 1e-9).floor()).all())
        assert bool((counts <= (share + 1e-9).ceil()).all())
        total += counts
    # A count has a variance of at most 1/4.
    assert float((total / num_batches - share).abs().max()) < 5 * 0.5 / math.sqrt(num_batches)


def test_rare_clusters_are_drawn_with_all_their_digits():
    """The mass of the ends is 1e-12: a difference of cumulative sums would have 4 digits."""
    process = FlowMatching(density=LogitNormal(0.0, 0.5))
    clusters = TimestepClusters((0, 30, 970, 1000))
    masses = clusters.masses(process.density)
    exact = torch.special.ndtr(torch.logit(torch.tensor(0.03, dtype=torch.float64)) / 0.5)
    assert float(masses[0]) == pytest.approx(float(exact), rel=1e-10)
    assert float(masses[2]) == pytest.approx(float(exact), rel=1e-10)
    cells, tasks = clusters.sample(
        3000, generator=torch.Generator().manual_seed(0), density=process.density
    )
    assert torch.equal(clusters.task_of(cells), tasks)
    # By symmetry the two ends are mirror images.
    low, high = cells[tasks == 0].double(), 999 - cells[tasks == 2].double()
    assert abs(float(low.mean() - high.mean())) < 5 * float(low.std()) * math.sqrt(2 / 1000)


def test_shares_estimate_the_loss_under_the_process_own_density():
    process = FlowMatching(density=LogitNormal(0.8, 1.0))
    clusters = TimestepClusters((0, 100, 500, 1000))
    losses = torch.linspace(5, 1, 1000, dtype=torch.float64)
    wanted = float((process.density * losses).sum())
    masses, generator = clusters.masses(process.density), torch.Generator().manual_seed(0)
    for allocation in ("equal", "proportional"):
        estimates = []
        for _ in range(500):
            cells, tasks = clusters.sample(
                10, generator=generator, allocation=allocation, density=process.density
            )
            counts = tasks.bincount(minlength=3).double()
            shares = sample_shares(masses, counts, allocation)
            estimates.append((losses[cells] * shares[tasks]).sum())
        estimates = torch.stack(estimates)
        assert abs(float(estimates.mean()) - wanted) < 5 * float(estimates.std()) / math.sqrt(500)


def test_a_cluster_without_mass_is_refused():
    process = FlowMatching(density=Table([1, 1, 0, 0]), num_timesteps=4)
    clusters = TimestepClusters((0, 2, 4))
    with pytest.raises(
        ConfigError, match=r"density: must have mass in every cluster, found 0.0 in"
    ):
        clusters.sample(4, density=process.density)
    with pytest.raises(ConfigError, match=r"density: must have the shape \[4\].*found \[3\]"):
        clusters.masses(torch.ones(3))


def test_a_shift_by_size_is_fixed_before_any_draw():
    process = FlowMatching(density=SizeShifted(LogitNormal(), base_size=32))
    with pytest.raises(ConfigError, match="density: SizeShifted must know the size"):
        process.density  # noqa: B018
    with pytest.raises(ConfigError, match="density: SizeShifted must know the size"):
        process.times(torch.tensor([0]), torch.tensor([0.5]))
    bound = process.for_size(64, 64)
    wanted = FlowMatching(density=Shifted(LogitNormal(), shift=2.0))
    assert torch.equal(bound.density, wanted.density)
    assert torch.equal(bound.log_snr, process.log_snr)  # the axis does not move
    assert bound.for_size(64, 64) is bound


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mode(2.0), r"scale: must be from -1 to 2 / \(pi - 2\), found 2.0"),
        (lambda: Shifted(shift=0), "shift: must be above 0 and finite, found 0"),
        (lambda: Shifted(LogNormal()), "density: must be Uniform or a density of t .*LogNormal"),
        (lambda: SizeShifted(base_size=0), "base_size: must be at least 1, found 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
