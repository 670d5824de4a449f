"""GradNorm against LibMTL's run, named parameters on every engine, and stopping in the middle."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ant_lightning import ConfigError, GradNorm, MultiTaskStep, PCGrad, multitask_backward

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "D_mtl"
ARRAYS = np.load(FOLDER / "gradnorm.npz")
NOTE = json.loads((FOLDER / "gradnorm.json").read_text())
K, FIRST, STEPS = NOTE["k"], NOTE["first_steps"], NOTE["steps"]
TASKS = torch.from_numpy(ARRAYS["tasks"])


def network():
    layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    nn.utils.vector_to_parameters(torch.from_numpy(ARRAYS["start"]), layers.parameters())
    return layers


def made(**settings):
    return GradNorm(K, alpha=NOTE["alpha"], initial_steps=FIRST, **settings)


def steps(stop_at=None, **settings):
    """Loss weights, parameters and reports of the run that LibMTL made."""
    layers, balancer = network(), made(**settings)
    step = MultiTaskStep(layers, balancer)
    x, y = torch.from_numpy(ARRAYS["x"]), torch.from_numpy(ARRAYS["y"])
    lrs = [NOTE["optimizer"][name]["lr"] for name in ("network", "loss_scale")]
    # The mean over tasks in place of the sum: k times the learning rate.
    optimizer = torch.optim.SGD(layers.parameters(), lr=K * lrs[0])
    own = torch.optim.Adam(balancer.parameters(), lr=lrs[1])
    weights, parameters, reports = [], [], []
    for number in range(FIRST + STEPS):
        if number == stop_at:
            state, of_own = step.state_dict(), own.state_dict()
            balancer = made(**settings)
            step = MultiTaskStep(layers, balancer)
            step.load_state_dict(state)
            own = torch.optim.Adam(balancer.parameters(), lr=lrs[1])
            own.load_state_dict(of_own)
        weights.append(K * balancer.task_weights)

        def losses(rows, number=number):
            errors = layers(x[number][rows]).squeeze(1) - y[rows]
            return errors.square() * (1 + 2.0 * TASKS[rows])

        reports.append(step.backward(losses, TASKS))
        optimizer.step()
        own.step()
        step.update()
        parameters.append(nn.utils.parameters_to_vector(layers.parameters()).detach())
    return torch.stack(weights), torch.stack(parameters), reports


def test_a_run_is_libmtls():
    weights, parameters, reports = steps()
    np.testing.assert_allclose(weights, ARRAYS["loss_weights"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(parameters, ARRAYS["parameters"], rtol=1e-5, atol=1e-5)
    # In the first steps nothing needs task gradients.
    assert [r.gramian is not None for r in reports] == [False] * FIRST + [True] * STEPS
    assert abs(ARRAYS["loss_weights"][-1] - 1).max() > 0.1


@pytest.mark.parametrize("stop_at", [2, 11])
def test_a_resumed_run_equals_an_unbroken_one(stop_at):
    settings = {"update_every": 3, "shared_parameters": ["2.*"]}
    for one, other in zip(steps(**settings)[:2], steps(stop_at, **settings)[:2], strict=True):
        assert torch.equal(one, other)


def test_between_updates_the_weights_stay():
    weights, _, reports = steps(update_every=5)
    assert [r.gramian is not None for r in reports[FIRST:]] == ([True] + [False] * 4) * 4
    changed = (weights.diff(dim=0) != 0).any(1).nonzero().flatten()
    assert changed.tolist() == [FIRST, FIRST + 5, FIRST + 10, FIRST + 15]


class Wide(nn.Module):
    """A tied layer, one whose weight meets few positions, and one of two dimensions."""

    def __init__(self):
        super().__init__()
        self.few, self.tied, self.out = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 2)

    def forward(self, x):
        return self.out(self.tied(self.tied(self.few(x).tanh()).tanh()))


def gradient(engine, patterns, micro_batch_size=None):
    torch.manual_seed(0)
    model = Wide().double()
    x, tasks = torch.randn(7, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0, 1, 1])
    balancer = GradNorm(3, initial_steps=1, shared_parameters=patterns)
    step = MultiTaskStep(model, balancer, engine=engine, micro_batch_size=micro_batch_size)
    for scale in (1, 2):  # the first only sets the losses

        def losses(rows, scale=scale):
            return model(x[rows]).square().mean(1) * (1 + scale * tasks[rows])

        step.backward(losses, tasks)
    names = [n for n, _ in model.named_parameters()]
    chosen = [p for n, p in model.named_parameters() if not patterns or n[:3] in patterns[0]]
    assert not patterns or len(chosen) == 2 < len(names)
    values = losses(torch.arange(7))
    means = torch.stack([values[tasks == i].mean() for i in range(3)])
    norms = torch.stack(
        [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(m, chosen, retain_graph=True)]
            ).norm()
            for m in means
        ]
    )
    first = torch.stack([(values / (1 + 2 * tasks))[tasks == i].mean() * (1 + i) for i in range(3)])
    return balancer.logits.grad, norms, (means / first).detach()


@pytest.mark.parametrize("patterns", [(), ("tied.*",), ("tied.weight", "tied.bias"), ("few.*",)])
@pytest.mark.parametrize("engine", ["loop", "one_pass", "low_memory", "in parts"])
def test_the_gradient_is_that_of_the_formula_on_every_engine(engine, patterns):
    parts = (
        {"engine": "loop", "micro_batch_size": 2} if engine == "in parts" else {"engine": engine}
    )
    found, norms, rates = gradient(patterns=patterns, **parts)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    scaled = 3 * logits.softmax(0) * norms
    wanted = (scaled.mean() * (rates / rates.mean()) ** 1.5).detach()
    (expected,) = torch.autograd.grad((scaled - wanted).abs().sum(), logits)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_task_without_samples_or_first_loss_keeps_its_share():
    balancer = GradNorm(4)
    nan = torch.nan
    norms = torch.tensor([1.0, nan, 3.0, 5.0], dtype=torch.float64)
    rates = torch.tensor([1.0, 1.0, 2.0, nan], dtype=torch.float64)
    found = balancer.slopes(norms, rates)
    assert found[1] == found[3]
    assert found.isfinite().all()
    assert found.sum().abs() < 1e-12


def test_a_step_that_is_not_finite_changes_nothing():
    layers, balancer = network(), made()
    step = MultiTaskStep(layers, balancer)
    before = str(balancer.state_dict())
    report = step.backward(lambda rows: layers(torch.ones(9, 3))[rows, 0] * torch.nan, TASKS)
    assert not report.finite
    assert str(balancer.state_dict()) == before
    assert balancer.logits.grad is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1}, "alpha: must be at least 0, found -1"),
        ({"lr": 0}, "lr: must be above 0, found 0"),
        ({"initial_steps": 0}, "initial_steps: must be at least 1, found 0"),
        ({"update_every": 0}, "update_every: must be at least 1, found 0"),
        ({"shared_parameters": "2.*"}, "shared_parameters: must be a list of names, found '2"),
    ],
)
def test_bad_arguments_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GradNorm(K, **settings)


def test_names_that_fit_nothing_are_refused():
    layers = network()
    losses = lambda rows: layers(torch.ones(len(rows), 3))[:, 0].square()  # noqa: E731
    balancer = GradNorm(K, initial_steps=1, shared_parameters=["2.*", "head.*"])
    step = MultiTaskStep(layers, balancer)
    with pytest.raises(ConfigError, match=r"found 'head.\*' among 0.weight .. 2.bias"):
        [step.backward(losses, TASKS) for _ in range(2)]
    with pytest.raises(ConfigError, match="among none; names need a MultiTaskStep"):
        multitask_backward(losses, TASKS, layers.parameters(), balancer)
    assert PCGrad(2).shared_parameters == ()
