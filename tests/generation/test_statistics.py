"""Statistics of images in files, and their comparison with an extractor."""

import pickle
import zipfile

import numpy as np
import pytest
import torch

from ant_lightning import (
    ConfigError,
    GaussianStatistics,
    ImageStatistics,
    ModuleFeatures,
)


@pytest.fixture
def reference():
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    gaussian = GaussianStatistics.from_features(features)
    return ImageStatistics(gaussian, features, extractor="network-1", image_shape=(1, 8, 8))


def _assert_same(first, second):
    assert torch.equal(first.gaussian.mean, second.gaussian.mean)
    assert torch.equal(first.gaussian.covariance, second.gaussian.covariance)
    assert first.gaussian.num_samples == second.gaussian.num_samples
    assert torch.equal(first.features, second.features)
    assert (first.extractor, first.image_shape) == (second.extractor, second.image_shape)


def test_what_is_saved_is_loaded(tmp_path, reference):
    path = tmp_path / "folder" / "reference.safetensors"
    reference.save(path, fingerprint="abc")
    _assert_same(ImageStatistics.load(path, fingerprint="abc"), reference)
    assert [entry.name for entry in path.parent.iterdir()] == ["reference.safetensors"]
    with pytest.raises(ConfigError, match="its metadata fingerprint must be 'b', found 'abc'"):
        ImageStatistics.load(path, fingerprint="b")
    alone = ImageStatistics(reference.gaussian)
    alone.save(path)
    loaded = ImageStatistics.load(path)
    assert (loaded.features, loaded.extractor, loaded.image_shape) == (None, "", None)


def test_the_adm_evaluator_can_read_an_npz(tmp_path, reference):
    path = tmp_path / "reference.npz"
    reference.save(path)
    exact = reference.features.double().numpy()
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file) == ["mu", "sigma"]
        np.testing.assert_allclose(file["mu"], exact.mean(0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(exact, rowvar=False), rtol=1e-12)
    assert ImageStatistics.load(path).gaussian.mean.tolist() == reference.gaussian.mean.tolist()


def test_a_reference_of_0_1_keeps_its_features(tmp_path, reference):
    path = tmp_path / "reference.npz"
    np.savez(
        path,
        mu=reference.gaussian.mean,
        sigma=reference.gaussian.covariance,
        features=reference.features,
        extractor=np.array("network-1"),
        fingerprint=np.array("abc"),
        num_samples=np.array(9),
        image_shape=np.array([1, 8, 8]),
    )
    loaded = ImageStatistics.load(path)
    assert torch.equal(loaded.features, reference.features)
    assert (loaded.extractor, loaded.gaussian.num_samples) == ("network-1", 9)


def test_a_file_of_the_adm_evaluator_is_read_without_its_other_arrays(tmp_path):
    path = tmp_path / "adm.npz"
    sigma = np.diag([1.0, 2.0, 3.0]).astype(np.float32)
    images = np.zeros((5, 8, 8, 3), np.uint8)
    np.savez(path, arr_0=images, mu=np.arange(3.0), sigma=sigma, mu_s=np.zeros(7))
    loaded = ImageStatistics.load(path)
    assert loaded.gaussian.mean.tolist() == [0, 1, 2]
    assert loaded.gaussian.covariance.dtype == torch.float64
    assert loaded.gaussian.num_samples is None
    assert loaded.features is None
    assert (loaded.extractor, loaded.image_shape) == ("", None)


def test_files_that_are_no_reference_are_refused(tmp_path):
    path = tmp_path / "reference.npz"
    with pytest.raises(ConfigError, match="readable npz file"):
        ImageStatistics.load(path)
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    crooked = np.eye(3)
    crooked[0, 1] = 0.5
    for arrays, message in (
        ({"mu": np.zeros(3)}, r"sigma of kind f and shape \[3, 3\], found nothing"),
        (good | {"sigma": np.eye(4)}, r"sigma .* shape \[3, 3\], found float64 of shape \[4, 4\]"),
        (good | {"mu": np.zeros((3, 1))}, r"mu .* shape \[n\], found float64 of shape \[3, 1\]"),
        (
            good | {"features": np.zeros((5, 2))},
            r"features .* shape \[n, 3\], found float64 of shape \[5, 2\]",
        ),
        (good | {"sigma": crooked}, "symmetric"),
        (good | {"sigma": np.full((3, 3), np.nan)}, "finite"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "finite"),
        (good | {"mu": np.array([0, np.inf, 0])}, "finite"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ConfigError, match=message):
            ImageStatistics.load(path)
    np.savez(path, **good)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match="readable npz file"):
        ImageStatistics.load(path)


def test_pickled_arrays_are_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "reference.npz", tmp_path / "trace"

    class Harmful:
        def __reduce__(self):
            return (type(trace).touch, (trace,))

    np.savez(path, mu=np.array([Harmful()], dtype=object), sigma=np.eye(1))
    with pytest.raises(ConfigError, match="plain numbers"):
        ImageStatistics.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", pickle.dumps(Harmful()))
    with pytest.raises(ConfigError, match="readable npz file"):
        ImageStatistics.load(path)
    assert not trace.exists()


def test_a_reference_of_something_else_is_refused(reference):
    def extractor(name="network-1", size=4):
        return ModuleFeatures(torch.nn.Identity(), num_features=size, name=name)

    reference.check(extractor(), (1, 8, 8))
    reference.check(extractor())
    with pytest.raises(ConfigError, match="number of features must be 64, found 4"):
        reference.check(extractor(size=64))
    with pytest.raises(ConfigError, match="extractor must be network-2, found network-1"):
        reference.check(extractor("network-2"))
    with pytest.raises(ConfigError, match=r"must be \(1, 16, 16\), found \(1, 8, 8\)"):
        reference.check(extractor(), (1, 16, 16))
    unnamed = ImageStatistics(GaussianStatistics(torch.zeros(4), torch.eye(4)))
    unnamed.check(extractor("any"), (3, 9, 9))
