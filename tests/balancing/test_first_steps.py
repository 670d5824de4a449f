"""Mistakes that show after some steps: weights in no optimizer, tasks that are never drawn."""

import warnings

import pytest
import torch

from ant_lightning import ContinuousUncertainty, MultiTaskStep, PCGrad, UncertaintyWeighting
from ant_lightning.balancing.first_steps import STEPS


def trained(balancer, *, learned=True, steps=STEPS + 1, size=4):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    step = MultiTaskStep(model, balancer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if learned and list(balancer.parameters()):
        optimizer.add_param_group({"params": balancer.parameters(), "lr": 0.025})
    x, tasks = torch.randn(size, 3), torch.arange(size) % 2
    for _ in range(steps):
        step.backward(
            lambda rows: model(x[rows]).square().mean(1), tasks, log_snr=torch.linspace(-2, 2, size)
        )
        optimizer.step()
        step.update()


@pytest.mark.parametrize("make", [UncertaintyWeighting, ContinuousUncertainty])
def test_weights_in_no_optimizer_are_said_once(make):
    with pytest.warns(UserWarning, match=r"balancer: \w+ learns its weights") as seen:
        trained(make(2), learned=False, steps=3 * STEPS)
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize(
    ("make", "learned", "steps"),
    [
        (UncertaintyWeighting, True, STEPS + 1),
        (ContinuousUncertainty, True, STEPS + 1),
        (UncertaintyWeighting, False, STEPS),
        (PCGrad, False, STEPS + 1),
    ],
)
def test_nothing_is_said_of_others(make, learned, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(make(2), learned=learned, steps=steps)


def test_tasks_that_are_never_drawn_are_said_once():
    with pytest.warns(UserWarning, match="PCGrad has 3 tasks, but 21 steps had .* first 2") as seen:
        trained(PCGrad(3), steps=3 * STEPS, size=8)
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_few_samples_say_nothing_of_a_task_without_any():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(PCGrad(3))
