"""Metrics against the ADM evaluator's stored numbers, torch-fidelity and torchmetrics."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ant_lightning import (
    DigitsFeatures,
    GaussianStatistics,
    GenerationScores,
    ImageFeatures,
    ImageStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "G_metrics"


@pytest.fixture(scope="module")
def golden():
    facts = json.loads((GOLDEN / "metrics.json").read_text())
    with np.load(GOLDEN / "metrics.npz", allow_pickle=False) as arrays:
        return facts, {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def digit_like():
    """Two sets of uint8 images that differ, and their features and logits."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (2, 150, 1, 4, 4))
    images = (
        np.kron(coarse, np.ones((1, 1, 1, 2, 2))) * np.array([1, 0.9])[:, None, None, None, None]
    )
    generated, real = (torch.from_numpy(part.astype(np.uint8)) for part in images)
    extractor = DigitsFeatures()
    return generated, real, extractor


def statistics(images, extractor):
    features = ImageFeatures(extractor)
    features.update(images)
    return features.compute()


def scored(extractor, generated, real, **settings):
    metric = GenerationScores(extractor, real=real, **settings)
    metric.update(generated)
    return metric.compute()


# --- the ADM evaluator ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("ref_vs_sample", "features_ref", "features_sample"),
        ("ref_vs_ref", "features_ref", "features_ref"),
        ("low_n_rank_deficient", "features_low_n_ref", "features_low_n_sample"),
    ],
)
def test_frechet_distance_equals_the_official_and_the_exact_value(golden, case, first, second):
    facts, arrays = golden
    value = frechet_distance(
        GaussianStatistics.from_features(arrays[first]),
        GaussianStatistics.from_features(arrays[second]),
    )
    official_tolerance = 1e-4 if case == "low_n_rank_deficient" else 1e-5
    expected = facts["fid"][case]
    assert value == pytest.approx(expected["official"], rel=official_tolerance, abs=1e-6)
    assert value == pytest.approx(expected["exact"], rel=1e-6, abs=1e-6)


def test_frechet_distance_of_given_statistics(golden):
    facts, arrays = golden
    value = frechet_distance(
        GaussianStatistics(arrays["mu1"], arrays["sigma1"]),
        GaussianStatistics(arrays["mu2"], arrays["sigma2"]),
    )
    assert value == pytest.approx(facts["fid"]["given_statistics"]["exact"], rel=1e-10)


def test_added_moments_give_the_exact_value(golden):
    facts, arrays = golden
    statistics = []
    for name in ("features_low_n_ref", "features_low_n_sample"):
        batches = arrays[name].double().split(7)
        total = sum(batch.sum(0) for batch in batches)
        outer = sum(batch.T @ batch for batch in batches)
        statistics.append(GaussianStatistics.from_sums(len(arrays[name]), total, outer))
    exact = facts["fid"]["low_n_rank_deficient"]["exact"]
    assert frechet_distance(*statistics) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_equal_the_exact_value(golden, k):
    facts, arrays = golden
    found = precision_recall(arrays["features_ref"], arrays["features_sample"], k=k)
    expected = facts["precision_recall"][f"k{k}"]
    assert found == (
        pytest.approx(expected["precision_exact"], rel=1e-12),
        pytest.approx(expected["recall_exact"], rel=1e-12),
    )
    assert found.precision == arrays[f"k{k}/sample_in_ref_manifold"].double().mean()
    assert found.recall == arrays[f"k{k}/ref_in_sample_manifold"].double().mean()


@pytest.mark.parametrize(("case", "size"), [("500", 500), ("100", 100), ("default5000", 5000)])
def test_inception_score_by_the_official_chunk_rule(golden, case, size):
    facts, arrays = golden
    expected = facts["inception_score"][f"split_{case}"]
    score = inception_score(arrays["logits"], split_size=size, seed=None)
    assert score.mean == pytest.approx(expected["exact"], rel=1e-6)
    assert score.mean == pytest.approx(expected["official_float32"], rel=1e-5)
    assert score.std == pytest.approx(np.std(expected["per_split_exact"]), rel=1e-6, abs=1e-9)


# --- torch-fidelity and torchmetrics on the same images ----------------------------------------


def test_torch_fidelity_gives_the_same_values_on_the_same_images(digit_like):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    generated, real, extractor = digit_like
    settings = {"kid_subset_size": 60, "kid_num_subsets": 7, "seed": 5}
    ours = scored(extractor, generated, statistics(real, extractor), **settings)
    with torch.no_grad():
        (first, logits), (second, _) = extractor.extract(generated), extractor.extract(real)
    # float64 features take torch-fidelity's own rounding out of the comparison
    first, second = first.double(), second.double()
    fid = fid_statistics_to_metric(
        fid_features_to_statistics(first), fid_features_to_statistics(second), False
    )
    kid = kid_features_to_metric(
        first, second, kid_subsets=7, kid_subset_size=60, rng_seed=5, verbose=False
    )
    prc = prc_features_to_metric(first, second, prc_neighborhood=3, verbose=False)
    isc = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=5)
    theirs = {
        "fid": fid["frechet_inception_distance"],
        "kid": kid["kernel_inception_distance_mean"],
        "kid_std": kid["kernel_inception_distance_std"],
        "precision": prc["precision"],
        "recall": prc["recall"],
        "inception_score": isc["inception_score_mean"],
        "inception_score_std": isc["inception_score_std"],
    }
    assert 0 < theirs["recall"] < 1
    assert 0 < theirs["precision"] < 1
    for name, value in theirs.items():
        # the shares come out of a float32 mean there
        assert ours[name] == pytest.approx(value, rel=1e-6), name


def test_torchmetrics_gives_the_same_fid_with_the_extractor_as_its_feature_module(digit_like):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class InFloat64(nn.Module):
        num_features = 64

        def __init__(self, extractor):
            super().__init__()
            self.extractor = extractor

        def forward(self, images):
            return self.extractor(images).double()

    generated, real, extractor = digit_like
    metric = FrechetInceptionDistance(InFloat64(extractor), normalize=False)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    ours = frechet_distance(
        *(statistics(images, extractor).gaussian for images in (generated, real))
    )
    assert ours == pytest.approx(metric.compute().item(), rel=1e-8)


def test_kernel_distance_has_torch_fidelitys_subsets_for_sets_of_two_sizes():
    from torch_fidelity.metric_kid import kid_features_to_metric

    rng = np.random.default_rng(1)
    generated = torch.from_numpy(rng.normal(size=(40, 12)))
    real = torch.from_numpy(rng.normal(0.3, 1.2, size=(55, 12)))
    theirs = kid_features_to_metric(
        generated, real, kid_subsets=9, kid_subset_size=30, rng_seed=11, verbose=False
    )
    ours = kernel_distance(real, generated, subset_size=30, num_subsets=9, seed=11)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-10)


def test_statistics_as_reference_give_the_fid_of_the_images(digit_like):
    generated, real, extractor = digit_like
    features = extractor(real).double().numpy()
    known = ImageStatistics(
        GaussianStatistics(
            torch.from_numpy(features.mean(0)), torch.from_numpy(np.cov(features, rowvar=False))
        )
    )
    scores = scored(extractor, generated, known)
    whole = scored(extractor, generated, statistics(real, extractor))
    assert scores["fid"] == pytest.approx(whole["fid"], rel=1e-9)
    assert set(scores) == {"fid", "num_images", "inception_score", "inception_score_std"}
