"""Balancers of losses and history against TorchJD 0.18, over 20 steps, stopped and resumed."""

import pytest
import torch
from torch import nn
from torchjd import aggregation, scalarization

from ant_lightning import (
    DWA,
    FAMO,
    GLS,
    IMTLL,
    RLW,
    STCH,
    ConfigError,
    GradVac,
    MultiTaskStep,
    gradvac_weights,
    multitask_backward,
)
from ant_lightning.randomness import keyed_seed

K, STEPS = 3, 20
TASKS = torch.tensor([0, 2, 1, 0, 1, 2, 2, 2])
OURS = {
    "dwa": lambda: DWA(K, window=4),
    "rlw": lambda: RLW(K, seed=7),
    "gls": lambda: GLS(K),
    "imtl_l": lambda: IMTLL(K).double(),
    "stch": lambda: STCH(K, mu=0.5),
    "famo": lambda: FAMO(K),
}
THEIRS = {
    "dwa": scalarization.DWA,
    "rlw": scalarization.Random,
    "gls": scalarization.GeometricMean,
    "imtl_l": lambda: scalarization.IMTLL(K),
    "stch": lambda: scalarization.STCH(0.5, weights=torch.ones(K, dtype=torch.float64)),
    "famo": lambda: scalarization.FAMO(K).double(),
}
# Those of which only the resume is tested here.
MADE = {**OURS, "gradvac": lambda: GradVac(K, seed=3)}
FACTORS = {"dwa": K, "imtl_l": K}  # there a sum over tasks, here a mean


def problem():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(len(TASKS), 3, dtype=torch.float64)

    def losses(rows):
        return (network(x[rows]).squeeze(1) - 2).square() * (1 + TASKS[rows])

    return network, losses


def ours(name, stop_at=None):
    (network, losses), balancer = problem(), MADE[name]()
    step = MultiTaskStep(network, balancer)
    for number in range(STEPS):
        if number == stop_at:
            state = step.state_dict()
            balancer = MADE[name]()
            step = MultiTaskStep(network, balancer)
            step.load_state_dict(state)
        report = step.backward(losses, TASKS)
        assert report.finite
        with torch.no_grad():
            for p in [*network.parameters(), *balancer.parameters()]:
                p -= 0.02 * p.grad  # noqa: PLW2901
        step.update()
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def theirs(name):
    (network, losses), other, factor = problem(), THEIRS[name](), FACTORS.get(name, 1)
    own = list(other.parameters()) if name == "imtl_l" else []

    def means():
        values = losses(torch.arange(len(TASKS)))
        return torch.stack([values[i == TASKS].mean() for i in range(K)])

    for number in range(STEPS):
        if name == "rlw":
            torch.manual_seed(keyed_seed(7, "random loss weighting", number))
        objective = other(means()) / factor
        if name == "dwa" and number < 8:
            assert other._compute_weights(means()).tolist() == [1, 1, 1]
        parameters = [*network.parameters(), *own]
        grads = torch.autograd.grad(objective, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p -= 0.02 * g  # noqa: PLW2901
            if name == "famo":
                other.update(means())
        if name == "dwa" and number % 4 == 3:
            other.step()
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("name", OURS)
def test_twenty_steps_are_those_of_torchjd(name):
    # IMTL-L has float32 parameters on both sides; FAMO and GLS guard their logarithms otherwise.
    close = 1e-5 if name == "imtl_l" else 1e-7
    torch.testing.assert_close(ours(name), theirs(name), rtol=close, atol=close)


@pytest.mark.parametrize("name", MADE)
def test_a_resumed_run_equals_an_unbroken_one(name):
    assert torch.equal(ours(name), ours(name, stop_at=9))


def test_gradvac_is_torchjds_over_twenty_steps_and_resumes():
    generator = torch.Generator().manual_seed(1)
    theirs = aggregation.GradVacWeighting()
    targets = torch.zeros(4, 4, dtype=torch.float64)
    for number in range(STEPS):
        rows = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        gramian = rows @ rows.T
        torch.manual_seed(number)
        orders = []
        for i in range(4):
            others = torch.tensor([j for j in range(4) if j != i])
            orders.append(others[torch.randperm(3)])
        torch.manual_seed(number)
        weights, targets = gradvac_weights(gramian, targets, torch.stack(orders))
        torch.testing.assert_close(weights, theirs(gramian), rtol=1e-9, atol=1e-9)
    one, other = GradVac(4), GradVac(4)
    one(gramian)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(gramian), other(gramian))


@pytest.mark.parametrize("name", ["gls", "stch", "famo"])
def test_a_task_without_samples_gets_no_weight(name):
    balancer = OURS[name]()
    weights = balancer.derivative(torch.tensor([1.0, torch.nan, 1.0], dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor([0.5, 0, 0.5], dtype=torch.float64))


def test_famo_must_be_updated_after_the_optimizer():
    network, losses = problem()
    step = MultiTaskStep(network, FAMO(K))
    step.backward(losses, TASKS)
    with pytest.raises(ConfigError, match=r"update: must be called .* with FAMO"):
        step.backward(losses, TASKS)
    with pytest.raises(ConfigError, match=r"state_dict: .* still lacks its update"):
        step.state_dict()
    with pytest.raises(ConfigError, match="balancer: FAMO looks back"):
        multitask_backward(losses, TASKS, network.parameters(), FAMO(K))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: STCH(K, mu=0), "mu: must be above 0, found 0"),
        (lambda: DWA(K, window=0), "window: must be at least 1, found 0"),
        (lambda: FAMO(K, lr=0), "lr: must be above 0, found 0"),
        (lambda: GLS(K, min_loss=-1), "min_loss: must be at least 0"),
        (lambda: GradVac(K, beta=2), r"beta: must be from 0 to 1, found 2"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
