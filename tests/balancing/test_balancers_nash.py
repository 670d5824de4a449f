"""NashMTL: the equation it solves, its properties, refreshes, failures and saved state."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ant_lightning import ConfigError, NashMTL, nash_weights


def _rows(seed, k, rank):
    """`[k, 12]`, float64, of a rank."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(k, rank)) @ rng.normal(size=(rank, 12)), rng


def _solve(rows, **settings_):
    return nash_weights(torch.from_numpy(rows @ rows.T), **settings_).numpy()


seeds, sizes = st.integers(0, 10**6), st.integers(1, 6)


@given(seeds, sizes)
@settings(max_examples=30, deadline=None)
def test_gramian_times_alpha_is_one_over_alpha(seed, k):
    rows, _ = _rows(seed, k, 12)
    alpha = _solve(rows, ridge=0.0)
    assert (alpha > 0).all()
    np.testing.assert_allclose(rows @ rows.T @ alpha, 1 / alpha, rtol=1e-8)


@given(seeds, sizes, st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_the_ridge_makes_it_solvable_at_any_rank_and_scale(seed, k, rank):
    rows, rng = _rows(seed, k, rank)
    rows *= 10.0 ** rng.choice([-10, 0, 10], size=(k, 1))
    alpha = _solve(rows)
    gramian = rows @ rows.T
    assert (alpha > 0).all()
    ridged = gramian + 1e-6 * np.diag(np.diag(gramian))
    # In units of each row, or the largest row drowns the sums of the others.
    scale = np.sqrt(np.diag(gramian))
    b, C = alpha * scale, ridged / scale / scale[:, None]
    np.testing.assert_allclose(b * (C @ b), 1, rtol=1e-6)


@given(seeds, st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_tasks_may_be_renamed_and_rescaled(seed, k):
    rows, rng = _rows(seed, k, 12)
    alpha, new = _solve(rows), rng.permutation(k)
    np.testing.assert_allclose(_solve(rows[new]), alpha[new], rtol=1e-9)
    scales = 10.0 ** rng.uniform(-5, 5, size=k)
    np.testing.assert_allclose(_solve(rows * scales[:, None]), alpha / scales, rtol=1e-9)


@given(seeds, sizes, st.sampled_from([1e-10, 1.0, 1e10]))
@settings(max_examples=20, deadline=None)
def test_the_update_has_norm_sqrt_k_over_k(seed, k, scale):
    rows = scale * _rows(seed, k, 12)[0]
    weights = NashMTL(k)(torch.from_numpy(rows @ rows.T)).numpy()
    assert np.linalg.norm(weights @ rows) == pytest.approx(np.sqrt(k) / k, rel=1e-4)


def test_tasks_without_a_gradient_take_no_part():
    rows, _ = _rows(0, 4, 12)
    alpha = _solve(np.insert(rows, [1, 4], 0, axis=0))
    kept = [0, 2, 3, 4]
    np.testing.assert_allclose(alpha[kept], _solve(rows), rtol=1e-9)
    np.testing.assert_array_equal(alpha[[1, 5]], alpha[kept].min())
    np.testing.assert_array_equal(_solve(np.zeros((3, 2))), 1)


def test_defect_4_exactly_opposed_gradients_have_finite_weights():
    """Defect 4: where the official solver gives up, every alpha silently stays at 1."""
    row = np.arange(1.0, 6.0)
    alpha = _solve(np.stack([row, -row, 1e-3 * row]))
    assert np.isfinite(alpha).all()
    assert (alpha > 0).all()
    assert np.abs(alpha - 1).min() > 0.1


def _hard_gramians():
    """Of full and low rank, over many decades, nearly parallel and exactly opposed rows."""
    for seed in range(6):
        for k, rank, decades in ((5, 12, 0), (5, 12, 3), (8, 3, 0), (8, 2, 3), (6, 1, 0)):
            rows, rng = _rows(seed, k, rank)
            rows *= 10.0 ** rng.uniform(-decades, decades, size=(k, 1))
            yield rows @ rows.T
        shared = rng.normal(size=12)
        for rows in (shared + 1e-4 * rng.normal(size=(5, 12)), np.stack([shared, -shared, shared])):
            yield rows @ rows.T


def test_cvxpy_leaves_the_residual_of_newton():
    for G in _hard_gramians():
        gramian, scale = torch.from_numpy(G), np.sqrt(np.diag(G))
        C = G / scale / scale[:, None] + 1e-6 * np.eye(len(G))
        for solver in ("newton", "cvxpy"):
            b = scale * nash_weights(gramian, solver=solver).numpy()
            # The last step leaves an error of the square of 1e-7. With the ridge, b is 1e3 at
            # most: some ten roundings of terms up to 1e6 that add up to 1.
            np.testing.assert_allclose(b * (C @ b), 1, rtol=1e-8, err_msg=solver)


@pytest.mark.parametrize("decades", [0, 3])
def test_cvxpy_finds_the_same(decades):
    rows, rng = _rows(1, 5, 12)
    rows *= 10.0 ** rng.uniform(-decades, decades, size=(5, 1))
    gramian = torch.from_numpy(rows @ rows.T)
    newton, cvxpy = NashMTL(5)(gramian), NashMTL(5, solver="cvxpy")(gramian)
    np.testing.assert_allclose(cvxpy.numpy(), newton.numpy(), rtol=1e-9)


@pytest.mark.parametrize("solver", ["newton", "cvxpy"])
def test_a_failure_warns_once_keeps_the_weights_and_is_counted(solver):
    """Defect 4 again: a bare `except` hid that no weights were found."""
    balancer = NashMTL(2, solver=solver)
    impossible = torch.tensor([[1.0, -5.0], [-5.0, 1.0]])  # not a matrix of dot products
    with pytest.warns(UserWarning, match="NashMTL found no weights"):
        first = balancer(impossible)
    assert first.tolist() == [0.5, 0.5]
    solved = balancer(torch.diag(torch.tensor([4.0, 16.0])))
    np.testing.assert_allclose(solved.numpy(), [0.25, 0.125], rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(balancer(impossible), solved)
        assert torch.equal(balancer(torch.full((2, 2), torch.nan)), solved)
    assert balancer.num_failures == 3


def test_weights_are_kept_between_refreshes():
    balancer = NashMTL(2, update_every=3)
    np.testing.assert_array_equal(balancer.task_weights, 0.5)
    due = []
    for step in range(7):
        due.append(balancer.refresh_due)
        if balancer.refresh_due:
            balancer(torch.eye(2) * (step + 1))
        else:
            balancer.count_step()
        expected = 0.5 / np.sqrt(3 * (step // 3) + 1)
        np.testing.assert_allclose(balancer.task_weights, expected, rtol=1e-5)
    assert due == [True, False, False] * 2 + [True]


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_defect_6_a_resumed_run_equals_one_never_stopped(stop):
    """Defect 6: the official resume loses Nash's state."""
    gramians = [torch.from_numpy(r @ r.T) for r in (_rows(s, 3, 12)[0] for s in range(8))]

    def run(balancer, steps):
        weights = []
        for step in steps:
            if balancer.refresh_due:
                balancer(gramians[step])
            else:
                balancer.count_step()
            weights.append(balancer.task_weights.tolist())
        return weights

    whole = run(NashMTL(3, update_every=3), range(8))
    first = NashMTL(3, update_every=3)
    parts = run(first, range(stop))
    first.num_failures = 2
    second = NashMTL(3, update_every=3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.num_failures == 2
    assert parts + run(second, range(stop, 8)) == whole


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match=r"update_every: .* found 0"):
        NashMTL(3, update_every=0)
    with pytest.raises(ConfigError, match=r"solver: .* found 'ecos'"):
        NashMTL(3, solver="ecos")
    with pytest.raises(ConfigError, match="gramian: "):
        NashMTL(3)(torch.eye(4))
