"""PCGrad on the Gramian, against the algorithm on vectors, and its properties."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ant_lightning import ConfigError, PCGrad, pcgrad_weights


def _rows(seed, k, rank, *, positive=False):
    """`[k, 9]`, float64, of a rank and a sign."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(k, rank)), rng.normal(size=(rank, 9))
    rows = np.abs(factors[0]) @ np.abs(factors[1]) if positive else factors[0] @ factors[1]
    return rows, rng


def _orders(rng, k):
    return np.stack([rng.permutation([j for j in range(k) if j != i]) for i in range(k)])


def _projected(rows, orders):
    """Algorithm 1 of arXiv 2001.06782, literally."""
    projected = rows.copy()
    for i, order in enumerate(orders):
        for j in order:
            dot = projected[i] @ rows[j]
            if dot < 0 and j != i and rows[j] @ rows[j] > 0:
                projected[i] -= dot / (rows[j] @ rows[j]) * rows[j]
    return projected


def _weights(rows, orders):
    gramian = torch.from_numpy(rows @ rows.T)
    return pcgrad_weights(gramian, torch.from_numpy(orders)).numpy()


matrices = {"seed": st.integers(0, 10**6), "k": st.integers(2, 6), "rank": st.integers(1, 6)}


@given(**matrices)
@settings(max_examples=60, deadline=None)
def test_equals_the_algorithm_on_vectors(seed, k, rank):
    rows, rng = _rows(seed, k, rank)
    orders = _orders(rng, k)
    expected = _projected(rows, orders).sum(0)
    found = _weights(rows, orders) @ rows
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(rows).max())


@given(**matrices)
@settings(max_examples=20, deadline=None)
def test_without_conflict_it_is_the_mean(seed, k, rank):
    rows, _ = _rows(seed, k, rank, positive=True)
    weights = PCGrad(k, seed=seed)(torch.from_numpy(rows @ rows.T))
    np.testing.assert_allclose(weights.numpy(), 1 / k, rtol=1e-14)


@given(**matrices)
@settings(max_examples=20, deadline=None)
def test_tasks_may_be_renamed(seed, k, rank):
    rows, rng = _rows(seed, k, rank)
    orders, new = _orders(rng, k), rng.permutation(k)
    renamed = np.argsort(new)[orders[new]]
    found = _weights(rows[new], renamed) @ rows[new]
    np.testing.assert_allclose(
        found, _weights(rows, orders) @ rows, rtol=0, atol=1e-9 * np.abs(rows).max()
    )


@given(**matrices, num_zero=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_survives_zero_deficient_and_scaled_rows(seed, k, rank, num_zero):
    rows, rng = _rows(seed, k, rank)
    rows *= 10.0 ** rng.choice([-10, 0, 10], size=(k, 1))
    rows[:num_zero] = 0
    weights = PCGrad(k, seed=seed)(torch.from_numpy(rows @ rows.T)).numpy()
    assert np.isfinite(weights).all()
    assert (weights >= 1 / k).all()
    np.testing.assert_array_equal(weights[:num_zero], 1 / k)


def test_a_gramian_may_be_part_of_a_graph():
    rows, rng = _rows(0, 5, 3)
    gramian, orders = torch.from_numpy(rows @ rows.T), torch.from_numpy(_orders(rng, 5))
    expected = pcgrad_weights(gramian, orders)
    assert torch.equal(pcgrad_weights(gramian.requires_grad_(), orders), expected)


def test_exactly_opposed_gradients_cancel():
    weights = PCGrad(2)(torch.tensor([[4.0, -2.0], [-2.0, 1.0]]))
    # g_1 = -2 g_2: both projections are zero.
    assert (weights @ torch.tensor([2.0, -1.0], dtype=torch.float64)).item() == 0


def test_one_task():
    assert PCGrad(1)(torch.tensor([[3.0]])).tolist() == [1.0]


def test_an_order_is_a_random_permutation_of_the_others():
    balancer = PCGrad(4, seed=1)
    drawn = torch.stack([balancer.draw_orders() for _ in range(400)])
    for i in range(4):
        others = [j for j in range(4) if j != i]
        assert bool((drawn[:, i].sort(1).values == torch.tensor(others)).all())
        counts = torch.unique(drawn[:, i], dim=0, return_counts=True)[1]
        assert len(counts) == 6  # each of 3! orders, about 67 times
        assert counts.min() > 30


def test_its_generator_is_its_own_and_is_saved():
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gramian = rows @ rows.T
    first, again, other = PCGrad(5, seed=3), PCGrad(5, seed=3), PCGrad(5, seed=4)
    before = torch.get_rng_state()
    reference = [first(gramian) for _ in range(6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len({tuple(w.tolist()) for w in reference}) > 1
    torch.manual_seed(99)
    found = [again(gramian) for _ in range(3)]
    state = copy.deepcopy(again.state_dict())
    again(gramian)
    other.load_state_dict(state)
    assert torch.equal(other.task_weights, found[-1])
    found += [other(gramian) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))


def test_it_never_has_to_ask_for_weights_twice():
    balancer = PCGrad(3)
    for _ in range(3):
        assert balancer.refresh_due
        balancer(torch.eye(3))


def test_it_never_waits_for_the_device():
    # On "meta" there are no numbers: whatever would have to read one raises.
    weights = pcgrad_weights(
        torch.eye(5, device="meta"), torch.zeros(5, 4, dtype=torch.int64, device="meta")
    )
    assert weights.device.type == "meta"
    assert PCGrad(5)(torch.eye(5, device="meta")).shape == (5,)


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match=r"num_tasks: .* found 0"):
        PCGrad(0)
    with pytest.raises(ConfigError, match=r"gramian: .*\[3, 3\], found \[2, 2\]"):
        PCGrad(3)(torch.eye(2))
