"""Balancers against the official implementations and independent exact solutions (golden/D_mtl)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ant_lightning import NashMTL, UncertaintyWeighting, nash_weights, pcgrad_weights

FOLDER = Path(__file__).parents[1] / "golden" / "D_mtl"


def _cases(name):
    return json.loads((FOLDER / f"{name}.json").read_text())["cases"]


def _load(name, key=""):
    with np.load(FOLDER / f"{name}.npz") as file:
        return {n.removeprefix(key + "/"): file[n] for n in file.files if n.startswith(key)}


@pytest.mark.parametrize("case", _cases("pcgrad"), ids=lambda c: f"{c['key']}_{c['mode']}")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_pcgrad_with_the_recorded_orders(case, dtype, tolerance):
    golden = _load("pcgrad", case["key"])
    rows = torch.from_numpy(golden["grads"]).to(dtype)
    weights = pcgrad_weights(rows @ rows.T, torch.from_numpy(golden["orders"]))
    expected = golden["sum_skip_self"]
    scale = np.abs(expected).max()
    np.testing.assert_allclose((weights @ rows).numpy(), expected, rtol=0, atol=tolerance * scale)
    if not case["self_projection_happens"]:
        np.testing.assert_allclose(weights.numpy(), golden["libmtl_weights"], rtol=1e-5)


def test_defect_4_pcgrad_never_projects_a_gradient_on_itself():
    """Defect 4: the official sum of this case has a gradient that was projected on itself."""
    (case,) = [c for c in _cases("pcgrad") if c["self_projection_happens"]]
    golden = _load("pcgrad", case["key"])
    rows = torch.from_numpy(golden["grads"]).double()
    found = pcgrad_weights(rows @ rows.T, torch.from_numpy(golden["orders"])) @ rows
    assert np.abs(found.numpy() - golden["sum"]).max() > 1e-3
    np.testing.assert_allclose(found.numpy(), golden["sum_skip_self"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", ["newton", "cvxpy"])
@pytest.mark.parametrize("case", _cases("nash"), ids=lambda c: c["key"])
def test_nash_equals_the_exact_solution(case, solver):
    golden = _load("nash", case["key"])
    for gramian, exact in zip(golden["gram"], golden["exact_alpha_gram"], strict=True):
        if case["update_weights_every"] == 1:
            alpha = nash_weights(torch.from_numpy(gramian), solver=solver)
            np.testing.assert_allclose(alpha.numpy(), exact, rtol=1e-5)
            alpha = nash_weights(torch.from_numpy(gramian).float(), solver=solver)
            np.testing.assert_allclose(alpha.numpy(), exact, rtol=1e-3)


def test_nash_refreshes_when_the_official_one_does():
    golden = _load("nash", "k3_update_every_3")
    balancer = NashMTL(3, update_every=3)
    refreshes = []
    for gramian, official in zip(golden["gram"], golden["ant_alpha"], strict=True):
        refreshes.append(balancer.refresh_due)
        if balancer.refresh_due:
            balancer(torch.from_numpy(gramian))
        else:
            balancer.count_step()
        np.testing.assert_allclose(3 * balancer.task_weights.numpy(), official, rtol=1e-5)
    assert refreshes == [True, False, False, True, False, False, True]


def test_defect_4_nash_solves_rows_over_four_decades():
    """Defect 4: here the official iteration mostly fails and may give negative weights."""
    golden = _load("nash", "k5_scales")
    solved = nash_weights(torch.from_numpy(golden["gram"][0])).numpy()
    norms = np.linalg.norm(golden["grads"][0], axis=1)
    assert norms.max() / norms.min() > 1e3
    np.testing.assert_allclose(solved * (golden["gram"][0] @ solved), 1, rtol=1e-4)
    np.testing.assert_allclose(solved, golden["exact_alpha_gram"][0], rtol=1e-5)
    assert np.abs(golden["ant_alpha"] / golden["exact_alpha_gram"] - 1).max() > 0.1


def test_uncertainty_weighting_values_and_gradients():
    golden = _load("uw", "static")
    balancer = UncertaintyWeighting(5)
    with torch.no_grad():
        balancer.log_vars.copy_(torch.from_numpy(golden["loss_scale"]))
    # The official object is given losses that were divided by k before; ours divides.
    losses = (5 * torch.from_numpy(golden["losses"])).requires_grad_()
    objective = balancer(losses)
    objective.backward()
    assert objective.item() == pytest.approx(float(golden["total"]), abs=1e-6)
    close = {"rtol": 0, "atol": 1e-6}
    np.testing.assert_allclose(balancer.log_vars.grad, golden["grad_loss_scale"], **close)
    np.testing.assert_allclose(5 * losses.grad, golden["grad_losses"], **close)
    np.testing.assert_allclose(5 * balancer.loss_weights(), golden["loss_weight"], **close)


def test_uncertainty_weighting_training_trace():
    golden = _load("uw", "trace")
    balancer = UncertaintyWeighting(5)
    optimizer = torch.optim.AdamW(balancer.parameters(), lr=balancer.lr, weight_decay=0.0)
    np.testing.assert_array_equal(balancer.log_vars.detach(), golden["loss_scale"][0])
    steps = zip(
        golden["per_sample_losses"], golden["total_loss"], golden["loss_scale"][1:], strict=True
    )
    for per_sample, total, log_vars in steps:
        objective = balancer(torch.from_numpy(per_sample).view(5, 10).mean(1))
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        assert objective.item() == pytest.approx(float(total), abs=1e-5)
        np.testing.assert_allclose(balancer.log_vars.detach(), log_vars, rtol=0, atol=1e-5)
