"""Weights that depend on the losses of their own step, and state that changes only after one."""

import pytest
import torch
from torch import nn

from ant_lightning import Balancer, ConfigError, LossBalancer, MultiTaskStep, multitask_backward

TASKS = torch.tensor([0, 2, 1, 0, 2, 2])


class Largest(Balancer):
    """Weights proportional to the losses of this step; counts its steps."""

    needs_losses = True

    def __init__(self, num_tasks):
        super().__init__(num_tasks)
        self.register_buffer("steps", torch.zeros(()))

    @property
    def task_weights(self):
        return torch.ones(self.num_tasks)

    def step_weights(self, step):
        return step.by_task(step.shown_losses.nan_to_num())

    def update(self, step, losses_now=None):
        self.steps += 1


def problem(dropout=0.0):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 1))
    network = network.double()
    x = torch.randn(len(TASKS), 3, dtype=torch.float64)

    def losses(rows):
        return (network(x[rows]).squeeze(1) - TASKS[rows]).square()

    return network, losses


def expected(network, losses, priors=None):
    """The gradient by hand: `sum_i L_i (k pi_i)^2 dL_i` with weights held constant."""
    values = losses(torch.arange(len(TASKS)))
    means = torch.stack([values[i == TASKS].mean() for i in range(3)])
    factors = torch.ones(3) if priors is None else 3 * priors
    (means.detach() * factors.square() * means).sum().backward()
    found = [p.grad for p in network.parameters()]
    network.zero_grad()
    return means.detach(), found


@pytest.mark.parametrize("size", [None, 1, 2, 4])
@pytest.mark.parametrize("priors", [None, torch.tensor([0.5, 0.3, 0.2])])
def test_weights_may_depend_on_the_losses_of_the_step(size, priors):
    network, losses = problem()
    means, gradients = expected(network, losses, priors)
    report = multitask_backward(
        losses, TASKS, network.parameters(), Largest(3), micro_batch_size=size, priors=priors
    )
    torch.testing.assert_close(report.task_losses, means)
    for p, g in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_the_two_passes_of_a_part_have_the_same_dropout():
    network, losses = problem(dropout=0.5)
    seen = []

    def recorded(rows):
        values = losses(rows)
        seen.append(values.detach())
        return values

    torch.manual_seed(1)
    multitask_backward(recorded, TASKS, network.parameters(), Largest(3), micro_batch_size=2)
    assert len(seen) == 6
    assert torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))
    assert not torch.equal(seen[0], losses(torch.arange(2)).detach())  # dropout was active


def test_state_changes_only_after_a_finite_step():
    network, losses = problem()
    balancer = Largest(3)
    report = multitask_backward(
        lambda rows: losses(rows) * torch.inf, TASKS, network.parameters(), balancer
    )
    assert not report.finite
    assert balancer.steps == 0
    multitask_backward(losses, TASKS, network.parameters(), balancer)
    assert balancer.steps == 1


@pytest.mark.parametrize("wrong", ["a factor", "of the losses"])
def test_weights_that_are_not_the_derivative_of_the_objective_are_refused(wrong):
    class Wrong(LossBalancer):
        def forward(self, task_losses):
            if wrong == "of the losses":
                return task_losses.square().sum()
            return 2 * task_losses.sum()

        def loss_weights(self):
            return torch.ones(2)

    model = torch.nn.Linear(3, 1)
    x, tasks = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ConfigError, match="loss_weights: must be the derivative"):
        MultiTaskStep(model, Wrong(2)).backward(
            lambda rows: 1 + model(x[rows]).square().mean(1), tasks
        )
