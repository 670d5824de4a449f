"""All scores at once: companions, warnings, what a reference can give, order of shards."""

import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from torch import nn

from ant_lightning import (
    ConfigError,
    GaussianStatistics,
    GenerationScores,
    ImageFeatures,
    ImageStatistics,
    ModuleFeatures,
    frechet_distance,
    kernel_distance,
)
from ant_lightning.generation.frechet import RankDeficientWarning

SETTINGS = {"kid_num_subsets": 5, "kid_subset_size": 20}


def statistics(images, extractor, *, batch_size=16):
    features = ImageFeatures(extractor)
    for batch in images.split(batch_size):
        features.update(batch)
    return features.compute()


def scored(extractor, generated, real, train=None, *, batch_size=16, **settings):
    """Scores of images, or statistics in the place of real and training images."""
    real, train = (
        statistics(each, extractor, batch_size=batch_size)
        if isinstance(each, torch.Tensor)
        else each
        for each in (real, train)
    )
    metric = GenerationScores(extractor, real=real, train=train, **(SETTINGS | settings))
    for batch in generated.split(batch_size):
        metric.update(batch)
    return metric.compute()


class _Pool(nn.Module):
    def forward(self, images):
        return nn.functional.avg_pool2d(images.double(), 2).flatten(1) / 64


@pytest.fixture
def extractor():
    return ModuleFeatures(_Pool(), num_features=4, name="pool")


@pytest.fixture
def sets():
    """Generated, held-out real and training images, uint8 [n, 1, 4, 4]."""
    rng = np.random.default_rng(0)
    return tuple(
        torch.from_numpy(rng.integers(low, 256, (size, 1, 4, 4)).astype(np.uint8))
        for low, size in ((30, 40), (0, 50), (0, 70))
    )


def _scipy_fid(first, second):
    means = [x.mean(0) for x in (first, second)]
    covariances = [np.cov(x, rowvar=False) for x in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    return ((means[0] - means[1]) ** 2).sum() + np.trace(sum(covariances) - 2 * root)


def test_every_score_by_its_definition(sets, extractor):
    generated, real, train = sets
    scores = scored(extractor, generated, real, train)
    x, y, z = (_Pool()(images).float().double().numpy() for images in sets)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2020)).numpy()
    expected = {
        "num_images": 40,
        "num_real": 50,
        "fid": _scipy_fid(x, y),
        "fid_real": _scipy_fid(z[order[:40]], y),
        "fid_real_num_images": 40,
        "fid_train": _scipy_fid(x, z[order[:50]]),
        "nearest_train_mean": cdist(x, z).min(1).mean(),
        "nearest_train_median": np.median(cdist(x, z).min(1)),
        "nearest_train_real_mean": cdist(y, z).min(1).mean(),
        "nearest_train_real_median": np.median(cdist(y, z).min(1)),
    }
    # Real images are scored as if they were generated ones.
    alike = scored(extractor, train[order[:40]], real)
    expected |= {f"{name}_real": alike[name] for name in ("kid", "precision", "recall")}
    assert set(scores) == {*expected, "kid", "kid_std", "precision", "recall"}
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=1e-6), name


def test_kid_of_whole_sets_is_computed_once_and_has_no_spread(sets, extractor):
    generated, real, _ = sets
    real = real[:40]
    whole = scored(extractor, generated, real, kid_subset_size=1000)
    once = kernel_distance(extractor(real), extractor(generated), subset_size=40, num_subsets=1)
    assert "kid_std" not in whole
    assert whole["kid"] == pytest.approx(once.mean, rel=1e-9)
    assert scored(extractor, generated, real, kid_subset_size=39)["kid_std"] > 0


def test_without_training_images_real_against_real_is_that_of_two_halves(sets, extractor):
    generated, real, _ = sets
    scores = scored(extractor, generated[:13], real)
    assert scores["fid_real_num_images"] == 13
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2020)).numpy()
    y = _Pool()(real).float().double().numpy()
    expected = _scipy_fid(y[order[:13]], y[order[13:26]])
    assert scores["fid_real"] == pytest.approx(expected, rel=1e-6)
    assert 0 < scores["precision_real"] <= 1
    assert 0 < scores["recall_real"] <= 1
    assert "fid_train" not in scores
    assert "nearest_train_mean" not in scores


def test_a_model_that_memorises_is_shown_up_by_its_companions(sets, extractor):
    _, real, train = sets
    scores = scored(extractor, train[:50], real, train)
    assert scores["nearest_train_mean"] == scores["nearest_train_median"] == 0
    assert scores["nearest_train_real_median"] > 0
    assert scores["fid_train"] < scores["fid"]


def test_statistics_that_are_known_score_as_the_images(sets, extractor):
    generated, real, train = sets
    known = [statistics(images, extractor, batch_size=99) for images in (real, train)]
    whole = scored(extractor, generated, real, train)
    assert scored(extractor, generated, *known) == pytest.approx(whole, rel=1e-9)


def test_the_size_of_the_batches_does_not_matter(sets, extractor):
    whole = scored(extractor, *sets)
    assert scored(extractor, *sets, batch_size=7) == pytest.approx(whole, rel=1e-9)


def test_a_reset_forgets_images_and_keeps_statistics(sets, extractor):
    generated, real, train = sets
    metric = GenerationScores(extractor, real=statistics(real, extractor), **SETTINGS)
    metric.update(generated)
    once = metric.compute()
    metric.reset()
    metric.update(train)
    other = metric.compute()
    assert other["num_images"] == len(train)
    metric.reset()
    metric.update(generated)
    assert metric.compute() == once


def test_moments_alone_keep_no_features(sets, extractor):
    generated, real, _ = sets
    moments = []
    for images in (generated, real):
        features = ImageFeatures(extractor, keep_features=False)
        for batch in images.split(16):
            features.update(batch)
        assert features.features == features.positions == []
        moments.append(features.compute().gaussian)
    fid = scored(extractor, generated, real)["fid"]
    assert frechet_distance(*moments) == pytest.approx(fid, rel=1e-12)


def test_too_few_images_warn_once_for_each_set_with_the_rank(sets, extractor):
    generated, real, _ = sets
    with pytest.warns(RankDeficientWarning) as caught:
        scored(extractor, generated[:4], real[:4], kid_subset_size=4)
    assert ["rank at most 3" in str(entry.message) for entry in caught] == [True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scored(extractor, generated[:5], real[:5], kid_subset_size=5)


def test_statistics_without_features_give_what_they_can(sets, extractor):
    generated, real, train = sets
    alone = ImageStatistics(GaussianStatistics.from_features(extractor(real)))
    scores = scored(extractor, generated, alone, train)
    assert set(scores) == {
        "fid",
        "fid_train",
        "nearest_train_mean",
        "nearest_train_median",
        "num_images",
        "num_real",
    }


def test_bad_input_names_the_rule_and_the_value(sets, extractor):
    generated, real, _ = sets
    with pytest.raises(ConfigError, match=r"k: must be less than .*images \(3\), found 3"):
        scored(extractor, generated[:3], real)
    known = statistics(real, extractor)
    wide = generated.repeat(1, 1, 1, 2)
    with pytest.raises(ConfigError, match=r"image shape must be \(1, 4, 8\), found \(1, 4, 4\)"):
        scored(extractor, wide, known)
    other = ModuleFeatures(_Pool(), num_features=4, name="other")
    with pytest.raises(ConfigError, match="its extractor must be other, found pool"):
        scored(other, generated, known)


# --- the features of one set --------------------------------------------------------------------


def test_shares_of_two_ranks_are_put_into_the_order_of_the_images(sets, extractor):
    """What torchmetrics' gathering leaves: rank 0's images and then rank 1's."""
    generated = sets[0][:9]
    whole, first, second = (ImageFeatures(extractor) for _ in range(3))
    for images, share in ((whole, generated), (first, generated[0::2]), (second, generated[1::2])):
        for batch in share.split(2):
            images.update(batch)
    first.features += second.features
    first.positions += second.positions
    for name in ("count", "total", "outer"):
        setattr(first, name, getattr(first, name) + getattr(second, name))
    found, expected = first.compute(), whole.compute()
    assert torch.equal(found.features, expected.features)
    torch.testing.assert_close(found.gaussian.covariance, expected.gaussian.covariance)
