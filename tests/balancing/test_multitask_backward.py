"""`multitask_backward` against gradients written out by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ant_lightning import (
    ConfigError,
    LinearScalarization,
    NashMTL,
    PCGrad,
    UncertaintyWeighting,
    multitask_backward,
    task_gradients,
)

K, B = 3, 14


class Problem:
    """A small regression with tasks of unequal size, one parameter that task 0 does not use."""

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
        self.extra = nn.Parameter(torch.randn(2, dtype=dtype))
        self.x = torch.randn(B, 4, dtype=dtype)
        self.y = torch.randn(B, 2, dtype=dtype)
        self.tasks = torch.tensor([0, 1, 2, 2, 1, 0, 2, 2, 2, 1, 0, 2, 1, 2])
        self.calls = []

    @property
    def parameters(self):
        return [*self.model.parameters(), self.extra]

    def losses(self, rows):
        self.calls.append(rows.tolist())
        out = self.model(self.x[rows])
        uses_extra = (self.tasks[rows] > 0)[:, None]
        if uses_extra.any():
            out = out + self.extra * uses_extra
        return (out - self.y[rows]).square().mean(1) * (1 + 3 * self.tasks[rows])

    def by_hand(self):
        """Task losses and the matrix of task gradients, by one backward pass for each task."""
        losses, rows = [], []
        for task in range(K):
            loss = self.losses(torch.nonzero(self.tasks == task).flatten()).mean()
            grads = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
            losses.append(loss.detach())
            rows.append(torch.cat([g.flatten() for g in grads]))
        self.calls.clear()
        return torch.stack(losses), torch.stack(rows)

    def grad(self):
        return torch.cat([p.grad.flatten() for p in self.parameters])


def balancers():
    return [
        LinearScalarization(K),
        UncertaintyWeighting(K),
        PCGrad(K, seed=3),
        NashMTL(K, update_every=1),
    ]


@pytest.mark.parametrize("balancer", balancers(), ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_gradient_is_the_weighted_sum_of_the_task_gradients(balancer, micro_batch_size):
    problem = Problem()
    losses, rows = problem.by_hand()
    twin = copy.deepcopy(balancer)
    report = multitask_backward(
        problem.losses,
        problem.tasks,
        problem.parameters,
        balancer,
        micro_batch_size=micro_batch_size,
    )
    if hasattr(twin, "loss_weights"):
        weights = twin.loss_weights().double()
    else:
        weights = twin(rows @ rows.T).double()
    assert report.finite
    torch.testing.assert_close(report.task_losses, losses)
    torch.testing.assert_close(report.task_weights, weights, rtol=1e-6, atol=0)
    torch.testing.assert_close(problem.grad(), weights @ rows, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        report.grad_norm.double(), (weights @ rows).norm(), rtol=1e-6, atol=1e-9
    )
    assert report.num_samples.tolist() == [3, 4, 7]


@pytest.mark.parametrize("balancer", [None, *balancers()], ids=lambda b: type(b).__name__)
def test_every_sample_is_computed_exactly_once(balancer):
    problem = Problem()
    multitask_backward(problem.losses, problem.tasks, problem.parameters, balancer, engine="loop")
    assert sorted(i for rows in problem.calls for i in rows) == list(range(B))


def test_without_a_balancer_it_is_the_mean_over_samples():
    problem = Problem()
    problem.losses(torch.arange(B)).mean().backward()
    expected = problem.grad()
    report = multitask_backward(problem.losses, problem.tasks, problem.parameters)
    torch.testing.assert_close(problem.grad(), expected)
    assert report.task_weights.tolist() == pytest.approx([3 / 14, 4 / 14, 7 / 14])


def test_gradients_of_the_official_uncertainty_objective():
    problem = Problem()
    losses, rows = problem.by_hand()
    balancer = UncertaintyWeighting(K)
    with torch.no_grad():
        balancer.log_vars.copy_(torch.tensor([-1.0, 0.5, 2.0]))
    multitask_backward(problem.losses, problem.tasks, problem.parameters, balancer)
    s = np.array([-1.0, 0.5, 2.0])
    expected = 0.5 * (1 - np.exp(-s) * losses.numpy() / K)
    np.testing.assert_allclose(balancer.log_vars.grad.numpy(), expected, rtol=1e-5)
    weights = torch.from_numpy(0.5 * np.exp(-s) / K)
    # The balancer's parameters and weights are float32: a few roundings of each weight.
    rounding = 4 * 2**-24 * float((weights @ rows.abs()).max())
    torch.testing.assert_close(problem.grad(), weights @ rows, rtol=0, atol=rounding)


def test_a_task_without_samples_does_not_move_its_own_uncertainty():
    problem = Problem()
    problem.tasks = problem.tasks.clamp(max=1)
    balancer = UncertaintyWeighting(K)
    multitask_backward(problem.losses, problem.tasks, problem.parameters, balancer)
    assert balancer.log_vars.grad[2] == 0
    assert (balancer.log_vars.grad[:2] != 0).all()


def test_priors_by_size_with_linear_weights_weight_each_task_by_its_prior():
    problem = Problem()
    _, rows = problem.by_hand()
    priors = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    multitask_backward(
        problem.losses, problem.tasks, problem.parameters, LinearScalarization(K), priors=priors
    )
    torch.testing.assert_close(problem.grad(), priors @ rows, rtol=1e-6, atol=1e-9)


def test_priors_reach_gradient_balancers_as_scaled_losses():
    problem = Problem()
    _, rows = problem.by_hand()
    priors = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    scaled = 3 * priors[:, None] * rows
    weights = NashMTL(K, update_every=1)(scaled @ scaled.T).double()
    multitask_backward(
        problem.losses, problem.tasks, problem.parameters, NashMTL(K, update_every=1), priors=priors
    )
    torch.testing.assert_close(problem.grad(), weights @ scaled, rtol=1e-5, atol=1e-8)


def test_between_refreshes_the_last_weights_are_used_in_one_pass():
    problem = Problem()
    balancer = NashMTL(K, update_every=3)
    first = multitask_backward(problem.losses, problem.tasks, problem.parameters, balancer)
    problem.calls.clear()
    second = multitask_backward(problem.losses, problem.tasks, problem.parameters, balancer)
    assert first.gramian is not None
    assert second.gramian is None
    assert len(problem.calls) == 1
    torch.testing.assert_close(second.task_weights, first.task_weights)
    multitask_backward(problem.losses, problem.tasks, problem.parameters, balancer)
    fourth = multitask_backward(problem.losses, problem.tasks, problem.parameters, balancer)
    assert fourth.gramian is not None


@pytest.mark.parametrize("balancer", [None, *balancers()], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_leaves_no_gradient_and_an_untouched_balancer(balancer, bad):
    problem = Problem()
    own = list(balancer.parameters()) if balancer else []
    multitask_backward(problem.losses, problem.tasks, problem.parameters, balancer)
    assert all(p.grad is not None for p in own)
    problem.x[4] = bad
    before = copy.deepcopy(balancer.state_dict()) if balancer else {}
    report = multitask_backward(problem.losses, problem.tasks, problem.parameters, balancer)
    assert not report.finite
    assert all(p.grad is None for p in [*problem.parameters, *own])
    after = balancer.state_dict() if balancer else {}
    assert str(before) == str(after)
    problem.x[4] = 0.0
    report = multitask_backward(problem.losses, problem.tasks, problem.parameters, balancer)
    assert report.finite


def test_loss_scale_multiplies_the_gradient_alone():
    for balancer in [None, *balancers()]:
        plain, scaled = Problem(), Problem()
        twin = copy.deepcopy(balancer)
        a = multitask_backward(plain.losses, plain.tasks, plain.parameters, balancer)
        b = multitask_backward(
            scaled.losses, scaled.tasks, scaled.parameters, twin, loss_scale=torch.tensor(64.0)
        )
        torch.testing.assert_close(scaled.grad(), 64 * plain.grad(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=1e-9)
        if balancer is not None and list(balancer.parameters()):
            torch.testing.assert_close(twin.log_vars.grad, 64 * balancer.log_vars.grad)


def test_bfloat16_parameters_get_bfloat16_gradients_from_float32_rows():
    problem = Problem(torch.float32)
    _, rows = problem.by_hand()
    low = Problem(torch.bfloat16)
    for p, q in zip(low.parameters, problem.parameters, strict=True):
        p.data = q.data.bfloat16()
    low.x, low.y = problem.x.bfloat16(), problem.y.bfloat16()
    report = multitask_backward(low.losses, low.tasks, low.parameters, PCGrad(K))
    assert all(p.grad.dtype == torch.bfloat16 for p in low.parameters)
    assert report.gramian.dtype == torch.float64
    torch.testing.assert_close(report.gramian, (rows @ rows.T).double(), rtol=0.05, atol=1.0)


def test_task_gradients_leave_grad_alone_and_a_missing_task_has_a_zero_row():
    problem = Problem()
    _, rows = problem.by_hand()
    gradients = task_gradients(problem.losses, problem.tasks, problem.parameters, num_tasks=4)
    assert all(p.grad is None for p in problem.parameters)
    expected = torch.cat([rows, torch.zeros(1, rows.shape[1], dtype=torch.float64)])
    torch.testing.assert_close(gradients.gramian(), expected @ expected.T)


def test_memory_layout_of_convolutions_is_kept():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    x = torch.randn(6, 3, 5, 5)
    tasks = torch.tensor([0, 0, 0, 1, 1, 1])

    def losses(rows):
        return conv(x[rows]).square().mean((1, 2, 3))

    multitask_backward(losses, tasks, conv.parameters(), LinearScalarization(2))
    expected = conv.weight.grad.clone()
    multitask_backward(losses, tasks, conv.parameters(), PCGrad(2))
    assert conv.weight.grad.stride() == conv.weight.stride()
    gramian = task_gradients(losses, tasks, conv.parameters(), num_tasks=2).gramian()
    if gramian[0, 1] >= 0:
        torch.testing.assert_close(conv.weight.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": torch.tensor([0, 3])}, ["tasks", "0 .. 2", "3"]),
        ({"tasks": torch.zeros(0, dtype=torch.long)}, ["tasks", "one integer"]),
        ({"tasks": torch.zeros(3)}, ["tasks", "float32"]),
        ({"priors": torch.tensor([0.5, 0.5, 0.5])}, ["priors", "sum 1"]),
        ({"priors": torch.tensor([0.5, 0.5, torch.nan])}, ["priors", "nan"]),
        ({"priors": torch.full((3,), torch.nan)}, ["priors", "nan"]),
        ({"micro_batch_size": 0}, ["micro_batch_size", "at least 1", "0"]),
        ({"parameters": []}, ["parameters", "at least one"]),
        ({"losses": lambda rows: torch.zeros(())}, ["losses", "one value for each row"]),
        ({"losses": lambda rows: rows.tolist()}, ["losses", "a tensor", "found list"]),
        ({"losses": lambda rows: torch.ones(len(rows))}, ["losses", "without a graph"]),
    ],
)
@pytest.mark.parametrize("make", [PCGrad, LinearScalarization])
def test_bad_input_names_the_argument(change, words, make):
    problem = Problem()
    arguments = {
        "losses": problem.losses,
        "tasks": problem.tasks,
        "parameters": problem.parameters,
        "balancer": make(K),
    } | change
    with pytest.raises(ConfigError) as error:
        multitask_backward(**arguments)
    assert all(word in str(error.value) for word in words)


def test_a_call_without_gradients_is_refused():
    problem = Problem()
    with torch.no_grad(), pytest.raises(ConfigError, match=r"losses: .* found torch\.no_grad"):
        multitask_backward(problem.losses, problem.tasks, problem.parameters, PCGrad(K))


@pytest.mark.parametrize("make", [PCGrad, LinearScalarization])
def test_losses_that_were_computed_before_are_refused(make):
    problem = Problem()
    before = problem.losses(torch.arange(B))
    with pytest.raises(ConfigError, match=r"losses: must call the model .* used up"):  # noqa: PT012
        for _ in range(2):
            multitask_backward(
                lambda rows: before[rows],
                problem.tasks,
                problem.parameters,
                make(K),
                engine="loop",
            )
