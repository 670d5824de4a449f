"""`TorchJDBalancer` against the golden arrays and independent exact solutions."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchjd import aggregation
from torchjd.linalg import QuadprogProjector

from ant_lightning import ConfigError, TorchJDBalancer

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "D_mtl"
ARRAYS = np.load(GOLDEN / "other_methods.npz")
CASES = json.loads((GOLDEN / "other_methods.json").read_text())["cases"]
KEYS = [case["key"] for case in CASES]
FULL_RANK = [case["key"] for case in CASES if case["mode"] != "rankdef"]


def weights_of(weighting, key):
    gramian = torch.from_numpy(ARRAYS[f"{key}/gram"])
    return TorchJDBalancer(len(gramian), weighting=weighting)(gramian).numpy()


def golden(key, name):
    return ARRAYS[f"{key}/{name}/weights"]


@pytest.mark.parametrize("key", KEYS)
def test_weights_are_those_of_the_official_runs(key):
    for weighting, name in [
        (aggregation.AlignedMTLWeighting(), "torchjd_aligned_mtl_min"),
        (aggregation.AlignedMTLWeighting(scale_mode="rmse"), "torchjd_aligned_mtl_rmse"),
        (aggregation.MGDAWeighting(), "torchjd_mgda"),
        (aggregation.IMTLGWeighting(), "torchjd_imtlg"),
    ]:
        expected = golden(key, name)
        np.testing.assert_allclose(weights_of(weighting, key), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("key", KEYS)
def test_upgrad_is_that_of_the_official_runs(key):
    expected = golden(key, "torchjd_upgrad")
    found = weights_of(aggregation.UPGradWeighting(), key)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("key", KEYS)
def test_cagrad_combines_to_the_gradient_of_the_exact_solution(key):
    grads = ARRAYS[f"{key}/grads"].astype(np.float64)
    found = weights_of(aggregation.CAGradWeighting(c=0.5, norm_eps=1e-12), key) @ grads
    exact = golden(key, "exact_cagrad_c0.5") @ grads
    assert np.linalg.norm(found - exact) <= 1e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("key", FULL_RANK)
def test_upgrad_without_regularisation_is_the_exact_projection(key):
    weighting = aggregation.UPGradWeighting(projector=QuadprogProjector(reg_eps=1e-14))
    expected = golden(key, "exact_upgrad")
    np.testing.assert_allclose(weights_of(weighting, key), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("key", FULL_RANK)
def test_imtlg_projections_on_all_unit_gradients_are_equal(key):
    gramian = ARRAYS[f"{key}/gram"]
    weights = weights_of(aggregation.IMTLGWeighting(), key)
    np.testing.assert_allclose(weights, golden(key, "libmtl_imtlg"), rtol=1e-6, atol=1e-8)
    projections = gramian @ weights / np.sqrt(np.diagonal(gramian))
    np.testing.assert_allclose(projections, projections[0], rtol=1e-6)


def test_scale_is_that_of_the_mean_without_conflict():
    gramian = torch.eye(4, dtype=torch.float64)
    for weighting in (aggregation.MGDAWeighting(), aggregation.AlignedMTLWeighting()):
        weights = TorchJDBalancer(4, weighting=weighting)(gramian)
        torch.testing.assert_close(weights, torch.full((4,), 0.25, dtype=torch.float64))


def test_random_weightings_ignore_the_global_generator_and_resume():
    gramian = torch.eye(3, dtype=torch.float64) - 0.4 * (1 - torch.eye(3, dtype=torch.float64))
    torch.manual_seed(0)
    first = TorchJDBalancer(3, weighting=aggregation.RandomWeighting(), seed=5)
    state = torch.random.get_rng_state()
    draws = [first(gramian) for _ in range(4)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(draws[0], draws[1])
    torch.manual_seed(99)
    again = TorchJDBalancer(3, weighting=aggregation.RandomWeighting(), seed=5)
    assert torch.equal(again(gramian), draws[0])
    assert torch.equal(again(gramian), draws[1])
    resumed = TorchJDBalancer(3, weighting=aggregation.RandomWeighting(), seed=5)
    resumed.load_state_dict(copy.deepcopy(again.state_dict()))
    assert torch.equal(resumed(gramian), draws[2])
    other = TorchJDBalancer(3, weighting=aggregation.RandomWeighting(), seed=6)
    assert not torch.equal(other(gramian), draws[0])


class Failing(aggregation.Weighting):
    """Works on the unit matrix alone."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, stat: torch.Tensor, /) -> torch.Tensor:
        if float(stat[0, 0]) != 1.0:
            if self.how == "raise":
                raise ValueError("no solution")
            return stat[0] * float("nan")
        return torch.full((len(stat),), 0.3)


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_a_failure_keeps_the_last_weights_and_is_said_once(how):
    balancer = TorchJDBalancer(2, weighting=Failing(how))
    bad = 2 * torch.eye(2, dtype=torch.float64)
    with pytest.warns(UserWarning, match="num_failures"):
        assert balancer(bad).tolist() == [0.5, 0.5]
    good = balancer(torch.eye(2, dtype=torch.float64))
    assert good.tolist() == pytest.approx([0.3, 0.3])
    assert balancer(bad).tolist() == good.tolist()
    assert balancer.num_failures == 2
    twin = TorchJDBalancer(2, weighting=Failing(how))
    twin.load_state_dict(balancer.state_dict())
    assert (twin.num_failures, twin.task_weights.tolist()) == (2, good.tolist())


class Counting(aggregation.Weighting):
    """Remembers in a plain attribute how often it was called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, stat: torch.Tensor, /) -> torch.Tensor:
        self.calls += 1
        return torch.full((len(stat),), 1 / self.calls)


# Why a weighting is refused, and what to use.
WHOLE = ("whole matrix of task gradients, and no rank holds it; use", "UPGradWeighting")


@pytest.mark.parametrize(
    ("weighting", "words"),
    [
        (nn.Linear(2, 2), ["torchjd.aggregation", "Linear"]),
        (aggregation.AlignedMTL(), ["weighting", "AlignedMTL"]),
        (aggregation.MoDoWeighting(gamma=0.1, rho=0.1), [*WHOLE, "MoDoWeighting"]),
        (aggregation.SDMGradWeighting(), [*WHOLE, "SDMGradWeighting"]),
        (aggregation.ExcessMTLWeighting(), [*WHOLE, "ExcessMTLWeighting"]),
        (
            aggregation.CRMOGMWeighting(aggregation.MoDoWeighting(gamma=0.1, rho=0.1)),
            [*WHOLE, "MoDoWeighting"],
        ),
        (Counting(), ["Counting", "changes ['calls']"]),
        (aggregation.ConstantWeighting(torch.ones(3)), ["ConstantWeighting", "2 tasks"]),
        (Failing("raise") << (lambda g: 2 * g), ["fails on 2 tasks", "no solution"]),
        (Failing("nan") << (lambda g: 2 * g), ["2 finite weights", "nan"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_modules_are_refused(weighting, words):
    with pytest.raises(ConfigError) as error:
        TorchJDBalancer(2, weighting=weighting)
    assert all(word in str(error.value) for word in words), error.value


REMEMBERING = {
    "gradvac": lambda: aggregation.GradVacWeighting(beta=0.3),
    "cr-mogm": lambda: aggregation.CRMOGMWeighting(aggregation.UPGradWeighting(), alpha=0.8),
    "cr-mogm of gradvac": lambda: aggregation.CRMOGMWeighting(aggregation.GradVacWeighting()),
    "pcd": lambda: aggregation.PCDWeighting(tau=0.5, beta=0.9),
}


def gramians(num):
    rows = torch.randn(num, 3, 5, generator=torch.Generator().manual_seed(3)).double()
    return rows @ rows.mT


@pytest.mark.parametrize("name", REMEMBERING)
def test_weightings_with_a_memory_are_torchjds_over_twenty_steps_and_resume(name, tmp_path):
    make = REMEMBERING[name]
    balancer, theirs, alone = TorchJDBalancer(3, weighting=make(), seed=5), make(), make()
    num_different = 0
    for number, gramian in enumerate(gramians(20), start=1):
        if number == 8:
            torch.save(balancer.state_dict(), tmp_path / "state.pt")
            balancer = TorchJDBalancer(3, weighting=make(), seed=5)
            balancer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        torch.manual_seed(5 + 1_000_003 * number)
        expected = theirs(gramian)
        torch.manual_seed(5 + 1_000_003 * number)
        alone.reset()
        num_different += not torch.equal(expected, alone(gramian))
        assert torch.equal(balancer(gramian), expected)
    assert num_different > 10  # the memory counts
    # Into one that has already made steps, and back to the beginning.
    balancer.load_state_dict(TorchJDBalancer(3, weighting=make(), seed=5).state_dict())
    first = gramians(1)[0]
    assert torch.equal(balancer(first), TorchJDBalancer(3, weighting=make(), seed=5)(first))


def test_a_failure_leaves_the_memory_as_it_was():
    balancer = TorchJDBalancer(3, weighting=aggregation.CRMOGMWeighting(Failing("nan")))
    balancer(torch.eye(3, dtype=torch.float64))
    before = balancer.weighting._lambda.clone()
    with pytest.warns(UserWarning, match="num_failures"):
        balancer(2 * torch.eye(3, dtype=torch.float64))
    assert torch.equal(balancer.weighting._lambda, before)
