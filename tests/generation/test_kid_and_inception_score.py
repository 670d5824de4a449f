"""Inception score and kernel distance against their definitions."""

import numpy as np
import pytest
import torch

from ant_lightning import ConfigError, inception_score, kernel_distance


def test_inception_score_lies_between_one_and_the_number_of_classes():
    certain = torch.eye(7).repeat(10, 1) * 200
    assert inception_score(certain, num_splits=1).mean == pytest.approx(7, rel=1e-12)
    assert inception_score(torch.zeros(40, 7)).mean == pytest.approx(1, rel=1e-12)
    assert inception_score(certain[:1].repeat(20, 1)).mean == pytest.approx(1, rel=1e-12)


def test_inception_score_is_finite_for_logits_of_any_scale():
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)) * 1e4
    score = inception_score(logits, num_splits=2)
    assert 1 < score.mean <= 5


def test_inception_score_by_hand():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(23, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    values = []
    for part in (p[:7], p[7:15], p[15:]):  # 23 // 3, 46 // 3
        marginal = part.mean(0)
        values.append(np.exp((part * np.log(part / marginal)).sum(1).mean()))
    score = inception_score(torch.from_numpy(logits), num_splits=3, seed=None)
    assert score.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert score.std == pytest.approx(np.std(values), rel=1e-12)
    shuffled = inception_score(torch.from_numpy(logits), num_splits=3, seed=1)
    assert shuffled.mean != score.mean
    assert shuffled == inception_score(torch.from_numpy(logits), num_splits=3, seed=1)


def test_kernel_distance_of_whole_sets_by_the_definition():
    rng = np.random.default_rng(1)
    real, generated = rng.normal(size=(12, 3)), rng.normal(0.5, 1, size=(12, 3))

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    value = 0.0
    for i in range(12):
        for j in range(12):
            value -= 2 * kernel(real[i], generated[j]) / 144
            if i != j:
                value += (kernel(real[i], real[j]) + kernel(generated[i], generated[j])) / 132
    found = kernel_distance(
        torch.from_numpy(real), torch.from_numpy(generated), subset_size=12, num_subsets=3
    )
    assert found.mean == pytest.approx(value, rel=1e-10)
    assert found.std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_unbiased_for_equal_distributions():
    generator = torch.Generator().manual_seed(2)
    real, generated = (torch.randn(2000, 4, generator=generator) for _ in range(2))
    found = kernel_distance(real, generated, subset_size=100, num_subsets=200)
    assert abs(found.mean) < 4 * found.std / np.sqrt(20)  # 20 disjoint subsets at most
    assert kernel_distance(real, generated + 1, subset_size=100).mean > 10 * found.std


def test_bad_input_names_the_rule_and_the_value():
    features = torch.zeros(10, 3)
    for size in (1, 11):
        with pytest.raises(ConfigError, match=rf"images \(10\), found {size}"):
            kernel_distance(features, torch.zeros(30, 3), subset_size=size)
    with pytest.raises(ConfigError, match="num_subsets: must be at least 1, found 0"):
        kernel_distance(features, features, subset_size=5, num_subsets=0)
    with pytest.raises(ConfigError, match=r"found \[10, 3\] and \[10, 4\]"):
        kernel_distance(features, torch.zeros(10, 4), subset_size=5)
    with pytest.raises(ConfigError, match=r"images \(10\), found 11"):
        inception_score(features, num_splits=11)
    with pytest.raises(ConfigError, match="split_size: must be at least 1, found 0"):
        inception_score(features, split_size=0)
    with pytest.raises(ConfigError, match=r"n >= 1, found \[0, 3\]"):
        inception_score(features[:0])
