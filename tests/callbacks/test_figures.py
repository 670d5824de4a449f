"""Figures: the numbers behind them, and that they can be drawn from anything they may be given."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from ant_lightning import (
    AffinityResult,
    ConfigError,
    CosineSchedule,
    DiscreteDiffusion,
    SNRClustering,
    TimestepClustering,
    TimestepClusters,
)
from ant_lightning.affinity.figure import affinity_curves, affinity_heat_maps
from ant_lightning.balancing.figure import gradient_arrows
from ant_lightning.callbacks.task_figures import task_history, transfer_heat_map
from ant_lightning.cli.curves import curves_figure
from ant_lightning.generation.figure import quality_history
from ant_lightning.tasks.figure import (
    boundaries_figure,
    cell_edges,
    clusterings_figure,
    importance_density,
)


def result(timesteps=(0, 10, 60), *, log_snr=True):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, len(timesteps), 30, generator=generator, dtype=torch.float64)
    return AffinityResult(
        timesteps=timesteps,
        num_timesteps=100,
        half_dots=torch.einsum("gip,hjp->ghij", rows, rows)[None],
        log_snr=DiscreteDiffusion(CosineSchedule(100)).log_snr if log_snr else None,
    )


def pixels(figure):
    file = io.BytesIO()
    figure.savefig(file, dpi=30)
    return imread(io.BytesIO(file.getvalue()))


def test_importance_is_the_sampling_probability_of_each_timestep():
    clusters = TimestepClusters((0, 2, 10, 100))
    generator = torch.Generator().manual_seed(0)
    timesteps, _ = clusters.sample(300_000, generator=generator)
    drawn = np.bincount(timesteps, minlength=100) / 300_000 * 100
    density = importance_density(clusters)
    assert density.mean() == pytest.approx(1)
    np.testing.assert_allclose(density, drawn, rtol=0.1)


def test_cells_lie_around_their_positions_and_share_edges():
    for positions in (np.array([0.0, 1.0, 5.0, 6.0]), np.array([9.0, 2.0, -30.0]), np.array([4.0])):
        edges = cell_edges(positions)
        assert len(edges) == len(positions) + 1
        cells = zip(positions, pairwise(edges), strict=True)
        assert all(min(cell) < position < max(cell) for position, cell in cells)


def test_heat_map_shows_the_matrix_and_greys_what_is_unknown():
    measured = result()
    figure = affinity_heat_maps(measured)
    for panel, values in zip(figure.axes[:2], (measured.plain, measured.corrected), strict=True):
        shown = np.ma.filled(panel.collections[0].get_array(), np.nan).reshape(3, 3)
        np.testing.assert_array_equal(shown, values.numpy())
    assert measured.corrected.isnan().any()  # noise alone has no estimate
    assert figure.axes[0].get_xlim() == (0, 85)
    with pytest.raises(ConfigError, match="log_snr"):
        affinity_heat_maps(result(log_snr=False), axis="log_snr")


FIGURES = {
    "log-SNR axis": lambda: affinity_heat_maps(result(), axis="log_snr"),
    "one timestep": lambda: affinity_heat_maps(result((5,))),
    "curves": lambda: affinity_curves(result(tuple(range(0, 100, 9)))),
    "curves of steps alone": lambda: affinity_curves(result(log_snr=False)),
    "clusterings": lambda: clusterings_figure(
        {
            name: kind(3)(DiscreteDiffusion(CosineSchedule(100)).log_snr)
            for name, kind in (("timestep", TimestepClustering), ("SNR", SNRClustering))
        },
        DiscreteDiffusion(CosineSchedule(100)).log_snr,
    ),
    "boundaries over time": lambda: boundaries_figure(
        [(0, (0, 20, 70, 100)), (50, (0, 30, 60, 100))],
        DiscreteDiffusion(CosineSchedule(100)).log_snr,
        last_step=100,
    ),
    "one measurement": lambda: quality_history({7: {"fid": 3.0, "fid_real": 1.0}}),
    "a value that came later": lambda: quality_history(
        {7: {"fid": 300.0}, 9: {"fid": 2.0, "precision": 0.0}}
    ),
    "transfer of 0": lambda: transfer_heat_map(np.zeros((2, 2)), labels=["a", "b"], title="t"),
    "arrows": lambda: gradient_arrows(
        np.array([[1.0, 0.2], [-1.0, 0.5]]), {"mean": np.array([0.0, 0.35])}
    ),
}


def test_log_snr_ends_where_the_tables_end():
    log_snr = DiscreteDiffusion(CosineSchedule(100)).log_snr
    clusters = TimestepClusters((0, 20, 99, 100))
    ends = (float(log_snr[0]), float(log_snr[-1]))
    figure = clusterings_figure({"own": clusters}, log_snr)
    assert figure.axes[3].get_xlim() == pytest.approx(ends)
    figure = boundaries_figure([(0, clusters.boundaries)], log_snr, last_step=9)
    assert figure.axes[1].get_ylim() == pytest.approx(ends)


def test_lines_of_steps_do_not_fall_to_0_at_their_ends():
    lines = affinity_heat_maps(result()).axes[2].patches
    drawn = clusterings_figure({"own": TimestepClusters((0, 10, 30))}, torch.linspace(5, -5, 30))
    lines = [*lines, *drawn.axes[2].patches, *drawn.axes[3].patches]
    assert len(lines) == 5
    assert all(each.get_data().baseline is None for each in lines)


def test_one_measurement_has_its_points_side_by_side():
    curves = {f"val/task_{i}/loss": [(60, 1.0)] for i in range(3)}
    (axis,) = curves_figure(curves).axes
    assert axis.get_title().endswith("one measurement, at step 60")
    (points,) = axis.collections
    assert points.get_offsets().tolist() == [[0, 1], [1, 1], [2, 1]]
    figure = task_history(np.array([60]), np.ones((1, 3)), np.ones((1, 3)), labels=list("abc"))
    assert [line.get_xdata() for line in figure.axes[0].lines] == [[0], [1], [2]]
    assert {line.get_marker() for line in figure.axes[0].lines} == {"o"}
    lines = curves_figure({name: [*line, (70, 1.0)] for name, line in curves.items()}).axes[0].lines
    assert len({line.get_marker() for line in lines}) == 3
    assert [line.get_markersize() for line in lines] == [7, 6, 5]  # the last lies on top


@pytest.mark.parametrize("name", FIGURES)
def test_it_can_be_drawn(name):
    picture = pixels(FIGURES[name]())
    assert np.isfinite(picture).all()
    assert (picture[..., :3].min(-1) < 0.5).any()
