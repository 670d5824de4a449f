import math

import numpy as np
import pytest
import tiny_digits
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from ant_lightning import ConfigError, DigitsData, TransferMatrix, transfer_matrix

CENTRES = np.array([[1.0, 0.0, 2.0], [0.5, 0.5, 1.0], [-1.0, 0.0, -2.0]])
START = np.array([0.1, -0.2, 0.3])


class Bowls:
    """Task i is `1 + |theta - centre_i|²`: every step and every loss is known."""

    def __init__(self):
        self.theta = torch.tensor(START, requires_grad=True)
        self.centres = torch.from_numpy(CENTRES)

    def loss(self, task):
        return 1 + (self.theta - self.centres[task]).square().sum()


def test_equals_the_definition():
    bowls, lr = Bowls(), 0.05
    found = transfer_matrix(bowls.loss, parameters=[bowls.theta], lr=lr, num_tasks=3)

    def loss(theta, j):
        return 1 + ((theta - CENTRES[j]) ** 2).sum()

    for i in range(3):
        stepped = START - lr * 2 * (START - CENTRES[i])
        for j in range(3):
            expected = 1 - loss(stepped, j) / loss(START, j)
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-12)
    assert (found.diagonal() > 0).all()
    assert found[0, 2] < 0 < found[0, 1]


def test_parameters_are_bit_for_bit_what_they_were():
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 3)
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    before = [each.clone() for each in network.parameters()]
    versions = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))

    def loss(task):
        return (network(versions) - task).square().mean()

    parameters = [*network.parameters(), frozen]
    transfer_matrix(loss, parameters=parameters, lr=0.1, num_tasks=3)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert all(each.grad is None for each in parameters)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_parameters_are_put_back_after_an_interrupt(error):
    bowls = Bowls()
    calls = 0

    def interrupted(task):
        nonlocal calls
        calls += 1
        if calls == 3 + 1 + 2:  # the second look after the first step
            assert not torch.equal(bowls.theta.detach(), torch.from_numpy(START))
            raise error
        return bowls.loss(task)

    with pytest.raises(error):
        transfer_matrix(interrupted, parameters=[bowls.theta], lr=0.1, num_tasks=3)
    assert torch.equal(bowls.theta.detach(), torch.from_numpy(START))


def test_step_that_overshoots_is_shown():
    bowls = Bowls()
    found = transfer_matrix(bowls.loss, parameters=[bowls.theta], lr=1.5, num_tasks=3)
    assert (found.diagonal() < 0).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"num_tasks": 0}, "num_tasks"),
        ({"parameters": []}, "parameters: must have at least one"),
    ],
)
def test_bad_settings_are_named(settings, words):
    bowls = Bowls()
    given = {"parameters": [bowls.theta], "lr": 0.1, "num_tasks": 3} | settings
    with pytest.raises(ConfigError, match=words):
        transfer_matrix(bowls.loss, **given)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_loss_without_a_share_is_refused(value):
    bowls = Bowls()
    with pytest.raises(ConfigError, match=r"found .* for task 1"):
        transfer_matrix(
            lambda task: bowls.loss(task) * 0 + value if task == 1 else bowls.loss(task),
            parameters=[bowls.theta],
            lr=0.1,
            num_tasks=3,
        )


def test_gradient_that_is_not_finite_is_refused():
    bowls = Bowls()

    def bad(task):
        return (
            1 + (bowls.theta - bowls.theta.detach()).square().sum().sqrt()
            if task == 2
            else (bowls.loss(task))
        )

    with pytest.raises(ConfigError, match=r"must have finite gradients, found .* task 2"):
        transfer_matrix(bad, parameters=[bowls.theta], lr=0.1, num_tasks=3)
    assert torch.equal(bowls.theta.detach(), torch.from_numpy(START))


def test_the_step_is_the_same_whatever_the_scale_of_mixed_precision(tmp_path):
    def matrix(scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugins = [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]
        callback = TransferMatrix(num_images=8, lr=0.1)
        run = tiny_digits.trainer(tmp_path, callback, plugins=plugins, limit_val_batches=1)
        run.validate(tiny_digits.module(), DigitsData(batch_size=8), verbose=False)
        return callback.matrix

    # A power of two only moves exponents; a step 64 times as long is another matrix.
    found, expected = matrix(64.0), matrix(1.0)
    assert expected.diagonal().abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=0.05, atol=1e-4)
