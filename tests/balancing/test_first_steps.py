"""Mistakes in the loop around a step, which train nothing or something else than was meant."""

import copy
import warnings

import pytest
import torch

from ant_lightning import (
    FAMO,
    ContinuousUncertainty,
    GradNorm,
    MultiTaskStep,
    PCGrad,
    UncertaintyWeighting,
)
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
        (GradNorm, True, STEPS + 1),  # its weights stay for the first 100 steps
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


class Loop:
    """A step on two tasks, and what belongs around it."""

    def __init__(self, balancer, size=16):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 1)
        self.step = MultiTaskStep(self.model, balancer)
        learned = [] if balancer is None else [*balancer.parameters()]
        self.optimizer = torch.optim.SGD([*self.model.parameters(), *learned], lr=0.01)
        self.x, self.tasks = torch.randn(size, 3), torch.arange(size) % 2

    def losses(self, rows):
        return self.model(self.x[rows]).square().mean(1)

    def backward(self, losses=None, **options):
        return self.step.backward(losses or self.losses, self.tasks, **options)


@pytest.mark.parametrize("make", [lambda k: None, PCGrad, UncertaintyWeighting])
def test_losses_of_another_copy_of_the_model_are_said(make):
    loop = Loop(make(2))
    other = copy.deepcopy(loop.model)
    with pytest.warns(UserWarning, match="losses: must depend on the parameters of the step"):
        loop.backward(lambda rows: other(loop.x[rows]).square().mean(1))


def test_gradients_that_cancel_out_are_no_mistake(recwarn):
    pull = torch.nn.Linear(1, 1, bias=False)
    ways = torch.tensor([1.0, -1.0])  # two tasks, one parameter, opposite gradients
    step = MultiTaskStep(pull, PCGrad(2))
    report = step.backward(lambda rows: pull.weight[0, 0] * ways[rows], torch.tensor([0, 1]))
    assert not report.grad_norm
    assert not [each for each in recwarn if "must depend on" in str(each.message)]


@pytest.mark.parametrize("make", [lambda k: None, PCGrad, UncertaintyWeighting])
def test_a_mean_in_place_of_the_losses_of_samples_is_said(make):
    loop = Loop(make(2))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loop.backward(lambda rows: loop.losses(rows).mean().expand(len(rows)))
    # An engine may say as well that samples depend on each other.
    assert "losses: must be one for each sample, found the same" in str(seen[-1].message)


@pytest.mark.parametrize("make", [lambda k: None, PCGrad, UncertaintyWeighting])
@pytest.mark.parametrize("forgotten", [False, True])
def test_parts_that_replace_each_other_are_said(make, forgotten):
    loop = Loop(make(2))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for i in range(6):
            loop.backward(accumulate=not forgotten and make is not PCGrad and i % 2 == 0)
            if i % 2 or (make is PCGrad and not forgotten):
                loop.optimizer.step()
            loop.step.update()
    words = "parameters: must change between two steps, found no change; pass accumulate=True"
    assert [str(each.message)[: len(words)] for each in seen] == [words] * forgotten
    assert all(each.filename == __file__ for each in seen)


@pytest.mark.parametrize("first", ["optimizer", "update"])
def test_an_update_before_the_step_of_the_optimizer_is_said(first):
    loop = Loop(FAMO(2))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            loop.backward()
            if first == "update":
                loop.step.update()
            loop.optimizer.step()
            loop.step.update()
    said = [str(each.message) for each in seen]
    assert [each.partition("; ")[2] for each in said] == (
        ["update comes after optimizer.step()"] if first == "update" else []
    )


def test_a_measurement_that_never_moves_the_parameters_is_left_alone():
    loop = Loop(PCGrad(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            loop.backward()
