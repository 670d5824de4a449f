"""Precision, recall and nearest distances against brute force, with ties and copies."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.spatial.distance import cdist

from ant_lightning import ConfigError, nearest_distance, precision_recall


def _brute_force(real, generated, k, distances):
    radii = [np.sort(distances(x, x), axis=1)[:, k] for x in (real, generated)]
    cross = distances(generated, real)
    return (cross <= radii[0]).any(1), (cross <= radii[1][:, None]).any(0)


def _integer_distances(a, b):
    return ((a[:, None] - b[None]) ** 2).sum(2)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(4, 25), st.integers(4, 25)),
    levels=st.sampled_from([2, 3, 10, 1000]),
    k=st.integers(1, 3),
    offset=st.sampled_from([0, 4096]),
)
def test_every_decision_is_exact_on_integers_where_ties_and_copies_abound(
    seed, sizes, levels, k, offset
):
    rng = np.random.default_rng(seed)
    real, generated = (rng.integers(0, levels, (size, 3)) + offset for size in sizes)
    expected = _brute_force(real, generated, k, _integer_distances)
    found = precision_recall(
        torch.from_numpy(real).float(), torch.from_numpy(generated).float(), k=k
    )
    assert found == (expected[0].mean(), expected[1].mean())
    nearest = nearest_distance(torch.from_numpy(generated).float(), torch.from_numpy(real).float())
    brute = np.sqrt(_integer_distances(generated, real).min(1))
    np.testing.assert_allclose(nearest.numpy(), brute, rtol=1e-15)


def test_several_blocks_give_what_one_matrix_gives():
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(2300, 3)), rng.normal(0.5, 1, size=(2100, 3))
    expected = _brute_force(real, generated, 3, cdist)
    precision, recall = precision_recall(torch.from_numpy(real), torch.from_numpy(generated))
    assert 0.5 < precision < 1
    assert 0.5 < recall < 1
    assert precision == pytest.approx(expected[0].mean(), rel=1e-12)
    assert recall == pytest.approx(expected[1].mean(), rel=1e-12)
    nearest = nearest_distance(torch.from_numpy(generated), torch.from_numpy(real))
    np.testing.assert_allclose(nearest.numpy(), cdist(generated, real).min(1), rtol=1e-10)


def test_radii_do_not_count_the_point_itself_but_count_its_copies():
    real = torch.tensor([[0.0], [0.0], [1.0], [4.0], [10.0]])  # radii 0, 0, 1, 3, 6
    generated = torch.tensor([[-0.5], [0.1], [3.5], [17.0], [30.0]])
    assert precision_recall(real, generated, k=1).precision == 2 / 5
    assert precision_recall(real, generated, k=2).precision == 4 / 5  # radii 1, 1, 1, 4, 9


def test_copies_are_inside_even_where_every_radius_is_zero():
    rng = np.random.default_rng(1)
    points = torch.from_numpy(rng.normal(1e4, 1, size=(6, 50))).float().repeat(3, 1)
    assert precision_recall(points, points.flip(0), k=2) == (1.0, 1.0)
    assert precision_recall(points, points + 1, k=2) == (0.0, 0.0)


def test_nearest_distance_of_an_exact_copy_is_zero_in_pixel_space():
    rng = np.random.default_rng(2)
    train = torch.from_numpy(rng.integers(0, 256, (30, 1, 8, 8), dtype=np.uint8))
    generated = train[[4, 9]].clone()
    generated[1, 0, 3, 3] ^= 3
    difference = abs(int(generated[1, 0, 3, 3]) - int(train[9, 0, 3, 3]))
    assert nearest_distance(generated, train).tolist() == [0.0, float(difference)]


def test_bad_input_names_the_rule_and_the_value():
    points = torch.zeros(4, 2)
    for k in (0, 4):
        with pytest.raises(ConfigError, match=rf"less than the number of images \(4\), found {k}"):
            precision_recall(points, torch.zeros(9, 2), k=k)
    with pytest.raises(ConfigError, match=r"found \[4, 2\] and \[3, 5\]"):
        precision_recall(points, torch.zeros(3, 5), k=1)
    for generated, train in ((points[:0], points), (points, points[:0])):
        with pytest.raises(ConfigError, match=r"\[m, 2\] with m >= 1"):
            nearest_distance(generated, train)
