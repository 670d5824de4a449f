"""Costs of segments and their partition, against the definitions and exhaustive search."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ant_lightning import ConfigError, affinity_costs, partition, snr_costs, timestep_costs


def _table(n, cost):
    table = np.full((n, n), np.inf)
    for left in range(n):
        for right in range(left, n):
            table[left, right] = cost(left, right, (left + right + 1) // 2)
    return table


@pytest.mark.parametrize("n", [1, 2, 3, 8, 21])
def test_costs_equal_their_definition(n):
    rng = np.random.default_rng(n)
    values, affinity = rng.normal(size=n) * 10.0 ** rng.integers(-3, 3, n), rng.normal(size=(n, n))
    expected = _table(n, lambda a, b, c: sum((t - c) ** 2 for t in range(a, b + 1)))
    np.testing.assert_array_equal(timestep_costs(n).numpy(), expected)
    for power in (1, 2, 1.5):
        expected = _table(
            n, lambda a, b, c, p=power: (abs(values[a : b + 1] - values[c]) ** p).sum()
        )
        found = snr_costs(torch.from_numpy(values), power=power)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    expected = _table(n, lambda a, b, c: -affinity[c, a : b + 1].sum())
    found = affinity_costs(torch.from_numpy(affinity))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_single_timesteps_and_equal_values_cost_exactly_nothing():
    values = torch.tensor([1e4, 1e4, 0.1, 0.1, 0.1, 1e-7], dtype=torch.float64)
    costs = snr_costs(values)
    assert not costs.diagonal().any()
    assert costs[2, 4] == 0


def test_float32_input_gives_float64_costs():
    assert snr_costs(torch.randn(5)).dtype == torch.float64
    assert affinity_costs(torch.eye(5)).dtype == torch.float64


def _exhaustive(table, k, min_size):
    """All (cost, sum of squared sizes, boundaries), best first: the documented order."""
    n = len(table)
    found = []
    for inner in combinations(range(1, n), k - 1):
        boundaries = (0, *inner, n)
        sizes = [b - a for a, b in pairwise(boundaries)]
        if min(sizes) >= min_size:
            cost = sum(table[a, b - 1] for a, b in pairwise(boundaries))
            found.append((cost, sum(s * s for s in sizes), boundaries))
    return sorted(found)


@given(st.data(), st.integers(1, 14), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_partition_equals_exhaustive_search_with_ties(data, n, k, min_size):
    # Small whole numbers, positive and negative: many exact ties.
    seed = data.draw(st.integers(0, 2**32 - 1))
    table = np.random.default_rng(seed).integers(-3, 4, (n, n)).astype(float)
    costs = torch.from_numpy(table)
    if k * min_size > n:
        with pytest.raises(ConfigError, match=f"num_tasks: .* {n // min_size} .* found {k}"):
            partition(costs, k, min_size=min_size)
        return
    assert partition(costs, k, min_size=min_size) == _exhaustive(table, k, min_size)[0][2]


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 29, 30])
def test_any_number_of_tasks_up_to_one_a_timestep(num_tasks):
    boundaries = partition(snr_costs(torch.linspace(9, -9, 30)), num_tasks)
    sizes = np.diff(boundaries)
    assert len(sizes) == num_tasks
    assert sizes.min() >= 1
    assert sizes.sum() == 30


def test_the_lower_triangle_is_ignored():
    costs = timestep_costs(12)
    expected = partition(costs, 3)
    for value in (-1e9, float("nan")):
        costs[tuple(torch.tril_indices(12, 12, -1))] = value
        assert partition(costs, 3) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition(torch.zeros(3, 4), 2), r"costs: .*\(3, 4\)"),
        (lambda: partition(torch.full((3, 3), torch.nan), 2), "costs: must be finite"),
        (lambda: partition(torch.zeros(3, 3), 0), "num_tasks: .* found 0"),
        (lambda: partition(torch.zeros(3, 3), 1, min_size=0), "min_size: .* found 0"),
        (lambda: timestep_costs(0), "num_timesteps: .* found 0"),
        (lambda: snr_costs(torch.zeros(3), power=0), "power: .* found 0"),
        (lambda: snr_costs(torch.tensor([0.0, -torch.inf])), "log_snr: .* 1 numbers"),
        (lambda: snr_costs(torch.zeros(2, 2)), r"log_snr: .*\(2, 2\)"),
        (lambda: affinity_costs(torch.zeros(2, 3)), r"affinity: .*\(2, 3\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
