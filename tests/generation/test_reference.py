"""Reference statistics and image batches as npz files, and the cache."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from ant_lightning import ConfigError, ReferenceStatistics, load_reference, save_reference
from ant_lightning.generation.image_files import image_batches
from ant_lightning.generation.moments import GaussianStatistics
from ant_lightning.generation.reference_cache import cached_reference, reference_fingerprint


@pytest.fixture
def reference():
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    return ReferenceStatistics.from_features(
        features, extractor="network-1", fingerprint="abc", image_shape=(1, 8, 8)
    )


def _assert_same(first, second):
    assert torch.equal(first.gaussian.mean, second.gaussian.mean)
    assert torch.equal(first.gaussian.covariance, second.gaussian.covariance)
    assert first.gaussian.num_samples == second.gaussian.num_samples
    assert torch.equal(first.features, second.features)
    assert (first.extractor, first.image_shape) == (second.extractor, second.image_shape)


def test_what_is_saved_is_loaded_and_the_adm_evaluator_can_read_it(tmp_path, reference):
    path = tmp_path / "folder" / "reference.npz"
    save_reference(path, reference)
    loaded = load_reference(path, num_features=4)
    _assert_same(loaded, reference)
    assert loaded.fingerprint == "abc"
    assert [entry.name for entry in path.parent.iterdir()] == ["reference.npz"]
    exact = reference.features.double().numpy()
    with np.load(path, allow_pickle=False) as file:
        np.testing.assert_allclose(file["mu"], exact.mean(0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(exact, rowvar=False), rtol=1e-12)


def test_a_file_of_the_adm_evaluator_is_read_without_its_other_arrays(tmp_path):
    path = tmp_path / "adm.npz"
    sigma = np.diag([1.0, 2.0, 3.0]).astype(np.float32)
    images = np.zeros((5, 8, 8, 3), np.uint8)
    np.savez(path, arr_0=images, mu=np.arange(3.0), sigma=sigma, mu_s=np.zeros(7))
    loaded = load_reference(path)
    assert loaded.gaussian.mean.tolist() == [0, 1, 2]
    assert loaded.gaussian.covariance.dtype == torch.float64
    assert loaded.gaussian.num_samples is None
    assert loaded.features is None
    assert (loaded.extractor, loaded.fingerprint, loaded.image_shape) == ("", "", None)


def test_files_that_are_no_reference_are_refused(tmp_path):
    path = tmp_path / "reference.npz"
    with pytest.raises(ConfigError, match="readable npz file"):
        load_reference(path)
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    crooked = np.eye(3)
    crooked[0, 1] = 0.5
    for arrays, message in (
        ({"mu": np.zeros(3)}, r"the array sigma, it holds \['mu'\]"),
        (good | {"sigma": np.eye(4)}, r"\[3, 3\] as sigma, found float64 of shape \[4, 4\]"),
        (good | {"mu": np.zeros((3, 1))}, r"\[n\] as mu, found float64 of shape \[3, 1\]"),
        (
            good | {"features": np.zeros((5, 2))},
            r"shape \[n, 3\] as features, found float64 of shape \[5, 2\]",
        ),
        (good | {"sigma": crooked}, "symmetric"),
        (good | {"sigma": np.full((3, 3), np.nan)}, "finite"),
        (good | {"mu": np.array([0, np.inf, 0])}, "finite"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ConfigError, match=message):
            load_reference(path)
    np.savez(path, **good)
    with pytest.raises(ConfigError, match="must have 2048 features as the extractor, got 3"):
        load_reference(path, num_features=2048)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match="readable npz file"):
        load_reference(path)


def test_pickled_arrays_are_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "reference.npz", tmp_path / "trace"

    class Harmful:
        def __reduce__(self):
            return (type(trace).touch, (trace,))

    np.savez(path, mu=np.array([Harmful()], dtype=object), sigma=np.eye(1))
    with pytest.raises(ConfigError, match="plain numbers"):
        load_reference(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", pickle.dumps(Harmful()))
    with pytest.raises(ConfigError, match="readable npz file"):
        load_reference(path)
    assert not trace.exists()


def test_a_reference_of_something_else_is_refused(reference):
    reference.check(num_features=4, extractor="network-1", image_shape=(1, 8, 8))
    reference.check(num_features=4)
    with pytest.raises(ConfigError, match="64 features as the extractor, got 4"):
        reference.check(num_features=64)
    with pytest.raises(ConfigError, match="'network-2', got 'network-1'"):
        reference.check(num_features=4, extractor="network-2")
    with pytest.raises(ConfigError, match=r"\(1, 16, 16\), got \(1, 8, 8\)"):
        reference.check(num_features=4, image_shape=(1, 16, 16))
    unnamed = ReferenceStatistics(GaussianStatistics(torch.zeros(4), torch.eye(4)))
    unnamed.check(num_features=4, extractor="any", image_shape=(3, 9, 9))


# --- the cache ----------------------------------------------------------------------------------


def test_the_cache_computes_once_for_each_fingerprint(tmp_path, reference):
    calls = []

    def compute():
        calls.append(1)
        return reference

    first = cached_reference(tmp_path, "key-1", compute)
    second = cached_reference(tmp_path, "key-1", compute)
    assert len(calls) == 1
    assert first.fingerprint == second.fingerprint == "key-1"
    _assert_same(second, reference)
    cached_reference(tmp_path, "key-2", compute)
    assert len(calls) == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["key-1.npz", "key-2.npz"]


def test_a_damaged_or_renamed_cache_file_is_made_again_with_a_warning(tmp_path, reference):
    path = tmp_path / "key.npz"
    path.write_bytes(b"half a file")
    with pytest.warns(UserWarning, match=r"key\.npz is computed again: .*readable"):
        cached_reference(tmp_path, "key", lambda: reference)
    _assert_same(load_reference(path), reference)
    save_reference(path, reference)  # fingerprint "abc"
    with pytest.warns(UserWarning, match="has fingerprint 'abc'"):
        cached_reference(tmp_path, "key", lambda: reference)
    assert load_reference(path).fingerprint == "key"


def test_a_failed_computation_leaves_nothing_behind(tmp_path):
    def compute():
        raise KeyError("no data")

    with pytest.raises(KeyError):
        cached_reference(tmp_path, "key", compute)
    broken = ReferenceStatistics(
        GaussianStatistics(torch.zeros(2), torch.eye(2)), image_shape=("x", "y", "z")
    )
    with pytest.raises(ValueError, match="invalid literal"):
        save_reference(tmp_path / "broken.npz", broken)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a" * 129])
def test_a_fingerprint_must_be_a_plain_file_name(tmp_path, reference, name):
    with pytest.raises(ConfigError, match="fingerprint must be"):
        cached_reference(tmp_path, name, lambda: reference)


def test_the_fingerprint_depends_on_every_part_and_on_where_it_ends():
    zeros = torch.zeros(2, 3, dtype=torch.uint8)
    ones = torch.ones(2, 3, dtype=torch.uint8)
    prints = {
        reference_fingerprint(*parts)
        for parts in (
            ("ab", "c"),
            ("a", "bc"),
            ("ab", "c", zeros),
            ("ab", "c", ones),
            ("ab", "c", zeros.view(3, 2)),
            ("ab", "c", zeros.to(torch.int8)),
            (1,),
            ("1",),
        )
    }
    assert len(prints) == 8
    assert reference_fingerprint("a", zeros) == reference_fingerprint("a", zeros.clone())


# --- image batches ------------------------------------------------------------------------------


def test_image_batches_are_streamed_in_order(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images, arr_1=np.arange(7))
    for name in ("plain", "packed"):
        batches = list(image_batches(tmp_path / f"{name}.npz", batch_size=3))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        joined = torch.cat(batches)
        assert joined.dtype == torch.uint8
        np.testing.assert_array_equal(joined.numpy(), images.transpose(0, 3, 1, 2))


def test_grey_images_have_one_channel(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6), dtype=np.uint8)
    for index, array in enumerate((images, images[..., None])):
        np.savez(tmp_path / f"{index}.npz", array)
        (batch,) = image_batches(tmp_path / f"{index}.npz")
        np.testing.assert_array_equal(batch.numpy(), images[:, None])


def test_files_that_hold_no_uint8_images_are_refused(tmp_path):
    path = tmp_path / "images.npz"
    for arrays, message in (
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "must hold an array arr_0"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint16)}, "8 bits.*got uint16"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"got \[2, 3, 8, 8\]"),
        ({"arr_0": np.zeros((2, 8), np.uint8)}, r"got \[2, 8\]"),
        ({"arr_0": np.zeros((3, 8, 8, 2), np.uint8).T}, "C order"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ConfigError, match=message):
            next(image_batches(path))
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        next(image_batches(path, batch_size=0))


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path):
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8, 3)}
    np.lib.format.write_array_header_1_0(buffer, header)
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue() + bytes(64))
    with pytest.raises(ConfigError, match="bytes by its header"):
        next(image_batches(tmp_path / "images.npz"))
