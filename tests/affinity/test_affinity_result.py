import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ant_lightning import AffinityResult, ConfigError, GradientClustering
from ant_lightning.files.safetensors_file import write_tensors

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
    """The file with some tensors or entries changed, or dropped where None."""
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["ant_lightning"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, value in changes.items():
        (tensors if name in tensors else metadata)[name] = value
    kept = [{n: v for n, v in part.items() if v is not None} for part in (tensors, metadata)]
    write_tensors(path, *kept)


@pytest.mark.parametrize("changes", [{}, {"sketch_dim": 64, "log_snr": None, "model": "é"}])
def test_file_round_trip(tmp_path, changes):
    before = result(**changes)
    before.save(tmp_path / "new" / "affinity.safetensors")
    after = AffinityResult.load(tmp_path / "new" / "affinity.safetensors")
    for field in dataclasses.fields(AffinityResult):
        one, two = getattr(before, field.name), getattr(after, field.name)
        same = torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
        assert same, field.name
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["affinity.safetensors"]


def test_file_holds_all_that_is_drawn(tmp_path):
    shown = result()
    shown.save(tmp_path / "affinity.safetensors")
    tensors = load_file(tmp_path / "affinity.safetensors")
    assert torch.equal(tensors["affinity"], shown.plain)
    assert torch.equal(tensors["corrected"], shown.corrected)
    assert torch.equal(tensors["reliability"], shown.reliability)
    assert tensors["timesteps"].tolist() == list(GRID)


def test_a_file_of_0_1_is_read(tmp_path):
    now = result(model="UNet")
    arrays = {
        "affinity": now.plain,
        "timesteps": np.array(GRID),
        "half_dots": now.half_dots,
        "log_snr": now.log_snr,
        **{name: getattr(now, name) for name in ("num_timesteps", "seed", "model")},
        **{"num_parameters": 6, "sketch_dim": 0, "format_version": 1, "method": "exact"},
    }
    np.savez(tmp_path / "old.npz", **arrays)
    then = AffinityResult.load(tmp_path / "old.npz")
    for field in dataclasses.fields(AffinityResult):
        one, two = getattr(now, field.name), getattr(then, field.name)
        same = torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
        assert same, field.name
    clustering = GradientClustering(tmp_path / "old.npz", 2)
    now.save(tmp_path / "new.safetensors")
    again = GradientClustering(tmp_path / "new.safetensors", 2)
    assert clustering(now.log_snr) == again(now.log_snr)
    assert clustering.measured_model() == again.measured_model() == "UNet"
    assert GradientClustering(now.plain).measured_model() is None


def test_gradient_clustering_reads_the_file(tmp_path):
    # Two groups of timesteps that point in two directions.
    rows = np.repeat([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]], 1, axis=0)
    dots = torch.from_numpy(np.einsum("gip,hjp->ghij", [rows, rows], [rows, rows]))[None]
    result(half_dots=dots).save(tmp_path / "affinity.safetensors")
    log_snr = torch.linspace(4, -4, 10, dtype=torch.float64)
    clusters = GradientClustering(tmp_path / "affinity.safetensors", num_tasks=2)(log_snr)
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
        ({"timesteps": (0, 3, 7, 8)}, "must have equal timesteps"),
        ({"num_timesteps": 11, "log_snr": None}, "must have equal num_timesteps, found 10 and 11"),
        ({"sketch_dim": 64}, "must have equal sketch_dim, found None and 64"),
        ({"num_parameters": 7}, "num_parameters"),
        ({"log_snr": torch.zeros(10, dtype=torch.float64)}, "must have equal log_snr"),
        ({"log_snr": None}, "must have equal log_snr"),
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
        ({"format": "other"}, "metadata format must be 'ant_lightning affinity', found 'other'"),
        ({"format": None}, "metadata format"),
        ({"seed": "3"}, "metadata seed must be of type int, found '3'"),
        (
            {"half_dots": torch.zeros(1, 2, 2, 3, 4).double()},
            r"half_dots as torch.float64 of shape \[1, 2, 2, 4, 4\], found torch.float64 of shape",
        ),
        ({"half_dots": torch.zeros(1, 2, 2, 4, 4)}, "found torch.float32"),
        (
            {"half_dots": torch.full((1, 2, 2, 4, 4), torch.nan).double()},
            "must be finite",
        ),
        ({"half_dots": None}, "must hold half_dots"),
        ({"timesteps": torch.tensor([0, 3, 7, 10])}, "timesteps: must increase within 0 .. 9"),
        ({"timesteps": torch.zeros(4)}, "timesteps as torch.int64 of shape"),
        ({"log_snr": torch.zeros(4).double()}, "log_snr: must have one value for each of 10"),
    ],
)
def test_damaged_file_is_refused_with_its_name(tmp_path, changes, words):
    path = tmp_path / "affinity.safetensors"
    result().save(path)
    rewrite(path, **changes)
    with pytest.raises(ConfigError, match=words) as caught:
        AffinityResult.load(path)
    assert "affinity.safetensors" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x08" + bytes(7) + b"cut shor", None])
def test_file_that_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "affinity.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"affinity.safetensors"):
        AffinityResult.load(path)


def test_every_cut_of_a_file_is_refused(tmp_path):
    path = tmp_path / "affinity.safetensors"
    result().save(path)
    whole = path.read_bytes()
    for length in range(1, len(whole), 397):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"affinity.safetensors"):
            AffinityResult.load(path)
