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
    GenerationScores,
    ModuleFeatures,
    ReferenceStatistics,
    kernel_distance,
)
from ant_lightning.generation.collect import collect_features, concatenate_features
from ant_lightning.generation.extractors.features import Features
from ant_lightning.generation.frechet import RankDeficientWarning
from ant_lightning.generation.moments import GaussianStatistics

SETTINGS = GenerationScores(kid_num_subsets=5, kid_subset_size=20, batch_size=16)


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
    scores = SETTINGS.evaluate(generated, real, extractor, train_images=train)
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
    assert set(scores) == {*expected, "kid", "kid_std", "precision", "recall"}
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=1e-6), name


def test_kid_of_whole_sets_is_computed_once_and_has_no_spread(sets, extractor):
    generated, real, _ = sets
    real = real[:40]
    whole = GenerationScores(kid_num_subsets=5).evaluate(generated, real, extractor)
    features = [collect_features(images, extractor).features for images in (real, generated)]
    once = kernel_distance(*features, subset_size=40, num_subsets=1)
    assert "kid_std" not in whole
    assert whole["kid"] == pytest.approx(once.mean, rel=1e-9)
    subsets = GenerationScores(kid_num_subsets=5, kid_subset_size=39)
    assert subsets.evaluate(generated, real, extractor)["kid_std"] > 0


def test_without_training_images_real_against_real_is_that_of_two_halves(sets, extractor):
    generated, real, _ = sets
    scores = SETTINGS.evaluate(generated[:13], real, extractor)
    assert scores["fid_real_num_images"] == 13
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2020)).numpy()
    y = _Pool()(real).float().double().numpy()
    expected = _scipy_fid(y[order[:13]], y[order[13:26]])
    assert scores["fid_real"] == pytest.approx(expected, rel=1e-6)
    assert "fid_train" not in scores
    assert "nearest_train_mean" not in scores


def test_a_model_that_memorises_is_shown_up_by_its_companions(sets, extractor):
    _, real, train = sets
    scores = SETTINGS.evaluate(train[:50], real, extractor, train_images=train)
    assert scores["nearest_train_mean"] == scores["nearest_train_median"] == 0
    assert scores["nearest_train_real_median"] > 0
    assert scores["fid_train"] < scores["fid"]


def test_shards_in_index_order_score_as_one_process(sets, extractor):
    generated, real, _ = sets
    reference = ReferenceStatistics.from_features(collect_features(real, extractor).features)
    ranks = [collect_features(generated[rank::2], extractor) for rank in range(2)]
    gathered = concatenate_features(ranks).features
    by_index = torch.empty_like(gathered)
    by_index[0::2], by_index[1::2] = gathered[:20], gathered[20:]
    whole = SETTINGS.evaluate(generated, reference, extractor)
    assert SETTINGS.score(Features(by_index), reference) == whole


def test_batches_from_an_iterator_score_as_one_tensor(sets, extractor):
    generated, real, train = sets
    whole = SETTINGS.evaluate(generated, real, extractor, train_images=train)
    streamed = SETTINGS.evaluate(
        iter(generated.split(7)), iter(real.split(9)), extractor, train_images=iter(train.split(8))
    )
    assert streamed == whole


def test_too_few_images_warn_once_for_each_set_with_the_rank(sets, extractor):
    generated, real, _ = sets
    with pytest.warns(RankDeficientWarning) as caught:
        SETTINGS.evaluate(generated[:4], real[:4], extractor)
    assert ["rank at most 3" in str(entry.message) for entry in caught] == [True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SETTINGS.evaluate(generated[:5], real[:5], extractor)


def test_statistics_without_features_give_what_they_can(sets, extractor):
    generated, real, train = sets
    features = collect_features(real, extractor).features
    statistics = ReferenceStatistics(GaussianStatistics.from_features(features))
    scores = SETTINGS.evaluate(generated, statistics, extractor, train_images=train)
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
    with pytest.raises(ConfigError, match="at least one image"):
        SETTINGS.evaluate(generated[:0], real, extractor)
    with pytest.raises(ConfigError, match="at least one image"):
        SETTINGS.evaluate(iter([]), real, extractor)
    with pytest.raises(ConfigError, match=r"more than k = 3 .* got 3"):
        SETTINGS.evaluate(generated[:3], real, extractor)
    wide = generated.repeat(1, 1, 1, 2)
    reference = ReferenceStatistics.from_features(
        collect_features(real, extractor).features, extractor="pool", image_shape=(1, 4, 4)
    )
    for images in (wide, iter([wide])):
        with pytest.raises(ConfigError, match=r"images of shape \(1, 4, 8\), got \(1, 4, 4\)"):
            SETTINGS.evaluate(images, reference, extractor)
    other = ModuleFeatures(_Pool(), num_features=4, name="other")
    with pytest.raises(ConfigError, match="extractor 'other', got 'pool'"):
        SETTINGS.evaluate(generated, reference, other)
