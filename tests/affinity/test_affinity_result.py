import dataclasses

import numpy as np
import pytest
import torch

from ant_lightning import AffinityResult, ConfigError, GradientClustering

GRID = (0, 3, 7, 9)


def result(seed=0, **changes):
    rows = np.random.default_rng(seed).standard_normal((2, 4, 6)) + 1
    dots = torch.from_numpy(np.einsum("gip,hjp->ghij", rows, rows))[None]
    given = AffinityResult(
        timesteps=GRID,
        num_timesteps=10,
        half_dots=dots,
        seed=3,
        model="toy, step 100",
        num_parameters=6,
        log_snr=torch.linspace(4, -4, 10, dtype=torch.float64),
    )
    return dataclasses.replace(given, **changes)


def rewrite(path, **changes):
    """The file with some arrays changed, or dropped where None."""
    with np.load(path) as file:
        arrays = dict(file) | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


@pytest.mark.parametrize("changes", [{}, {"sketch_dim": 64, "log_snr": None, "model": "é"}])
def test_file_round_trip(tmp_path, changes):
    before = result(**changes)
    before.save(tmp_path / "new" / "affinity.npz")
    after = AffinityResult.load(tmp_path / "new" / "affinity.npz")
    for field in dataclasses.fields(AffinityResult):
        one, two = getattr(before, field.name), getattr(after, field.name)
        same = torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
        assert same, field.name
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["affinity.npz"]


def test_file_holds_all_that_is_drawn(tmp_path):
    shown = result()
    shown.save(tmp_path / "affinity.npz")
    with np.load(tmp_path / "affinity.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["affinity"], shown.plain.numpy())
        np.testing.assert_array_equal(file["corrected"], shown.corrected.numpy())
        np.testing.assert_array_equal(file["reliability"], shown.reliability.numpy())
        np.testing.assert_array_equal(file["timesteps"], GRID)
        assert file["num_timesteps"] == 10
        assert str(file["method"]) == "exact"


def test_gradient_clustering_reads_the_file(tmp_path):
    # Two groups of timesteps that point in two directions.
    rows = np.repeat([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]], 1, axis=0)
    dots = torch.from_numpy(np.einsum("gip,hjp->ghij", [rows, rows], [rows, rows]))[None]
    result(half_dots=dots).save(tmp_path / "affinity.npz")
    log_snr = torch.linspace(4, -4, 10, dtype=torch.float64)
    clusters = GradientClustering(tmp_path / "affinity.npz", num_tasks=2)(log_snr)
    # Timesteps 0..5 are nearest to grid points 0 and 3, the rest to 7 and 9.
    assert clusters.boundaries == (0, 6, 10)


def test_mean_is_of_cosines_so_that_each_checkpoint_counts_alike():
    one, two = result(0), result(1)
    louder = dataclasses.replace(two, half_dots=1e6 * two.half_dots, model="toy, step 200")
    mean = AffinityResult.mean([one, louder])
    assert mean.num_checkpoints == 2
    assert mean.model == "toy, step 100, toy, step 200"
    torch.testing.assert_close(mean.plain, (one.plain + two.plain) / 2)
    torch.testing.assert_close(mean.corrected, (one.corrected + two.corrected) / 2)
    torch.testing.assert_close(mean.reliability, (one.reliability + two.reliability) / 2)
    three = AffinityResult.mean([mean, result(2)])
    expected = (one.plain + two.plain + result(2).plain) / 3
    torch.testing.assert_close(three.plain, expected)
    squares = one.corrected_standard_error**2 + two.corrected_standard_error**2
    torch.testing.assert_close(mean.corrected_standard_error, squares.sqrt() / 2)


def test_mean_leaves_out_checkpoints_without_an_estimate():
    one, two = result(0), result(1)
    dots = two.half_dots.clone()
    dots[0, 0, 1, 2, 2] = dots[0, 1, 0, 2, 2] = -1.0  # noise alone, by chance
    broken = dataclasses.replace(two, half_dots=dots)
    assert broken.corrected[2].isnan().all()
    mean = AffinityResult.mean([one, broken])
    torch.testing.assert_close(mean.corrected[2, :2], one.corrected[2, :2])
    torch.testing.assert_close(mean.corrected[0, 1], (one.corrected + two.corrected)[0, 1] / 2)
    torch.testing.assert_close(
        mean.corrected_standard_error[2, :2], one.corrected_standard_error[2, :2]
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timesteps": (0, 3, 7, 8)}, "timesteps must be the same"),
        ({"num_timesteps": 11, "log_snr": None}, "num_timesteps must be the same, found 10 and 11"),
        ({"sketch_dim": 64}, "sketch_dim must be the same, found None and 64"),
        ({"num_parameters": 7}, "num_parameters"),
        ({"log_snr": torch.zeros(10, dtype=torch.float64)}, "log_snr must be the same"),
        ({"log_snr": None}, "log_snr must be the same"),
    ],
)
def test_mean_of_different_measurements_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        AffinityResult.mean([result(), result(**changes)])


def test_mean_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="at least one"):
        AffinityResult.mean([])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": np.asarray(2)}, "format_version must be 1, found 2"),
        ({"format_version": None}, "affinity.npz"),
        (
            {"half_dots": np.zeros((1, 2, 2, 3, 4))},
            r"shape \[n, 2, 2, 4, 4\] as half_dots, found float64 of shape \[1, 2, 2, 3",
        ),
        ({"half_dots": np.full((1, 2, 2, 4, 4), np.nan)}, "finite numbers as half_dots"),
        ({"half_dots": None}, "half_dots"),
        ({"half_dots": np.array([object()])}, "affinity.npz"),
        ({"timesteps": np.array([0, 3, 7, 10])}, "timesteps: must increase within 0 .. 9"),
        (
            {"timesteps": np.array([0.0, 3, 7, 9])},
            r"integers of shape \[n\] as timesteps, found float64",
        ),
        ({"timesteps": np.arange(4).reshape(2, 2)}, r"integers of shape \[n\] as timesteps"),
        ({"num_timesteps": np.array([1, 2])}, "affinity.npz"),
        ({"log_snr": np.zeros(4)}, "log_snr: must have one value for each of 10"),
        ({"log_snr": np.array(["a"])}, "affinity.npz"),
    ],
)
def test_damaged_file_is_refused_with_its_name(tmp_path, changes, words):
    path = tmp_path / "affinity.npz"
    result().save(path)
    rewrite(path, **changes)
    with pytest.raises(ConfigError, match=words) as caught:
        AffinityResult.load(path)
    assert "affinity.npz" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short", None])
def test_file_that_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "affinity.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"affinity.npz"):
        AffinityResult.load(path)


def test_every_cut_of_a_file_is_refused(tmp_path):
    path = tmp_path / "affinity.npz"
    result().save(path)
    whole = path.read_bytes()
    for length in range(1, len(whole), 397):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"affinity.npz"):
            AffinityResult.load(path)
