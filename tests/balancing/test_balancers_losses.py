"""Loss balancers: objective, weights, precision, and the bound on uncertainty weights."""

import copy

import numpy as np
import pytest
import torch

from ant_lightning import ConfigError, LinearScalarization, PCGrad, UncertaintyWeighting

LOSSES = [0.3, 2.0, 1e-4]


def _uncertainty(**settings):
    balancer = UncertaintyWeighting(3, **settings)
    with torch.no_grad():
        balancer.log_vars.copy_(torch.tensor([-1.0, 0.5, -6.0]))
    return balancer


@pytest.mark.parametrize(
    "balancer",
    [
        LinearScalarization(3),
        LinearScalarization(3, weights=[3.0, 0.5, 1.0]),
        _uncertainty(),
        _uncertainty(min_loss=0.05),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_the_derivative_is_the_loss_weights_whatever_the_losses(balancer, scale):
    losses = (scale * torch.tensor(LOSSES, dtype=torch.float64)).requires_grad_()
    (derivative,) = torch.autograd.grad(balancer(losses), losses)
    weights = balancer.loss_weights()
    assert not weights.requires_grad
    np.testing.assert_allclose(derivative, weights, rtol=1e-6)
    assert torch.equal(balancer.task_weights, weights)


def test_linear_scalarization_is_the_mean_or_the_given_weights():
    losses = torch.tensor(LOSSES, dtype=torch.float64)
    assert LinearScalarization(3)(losses).item() == pytest.approx(np.mean(LOSSES))
    given = LinearScalarization(3, weights=(3, 0.5, 1))
    assert given(losses).item() == pytest.approx(np.dot(LOSSES, [3, 0.5, 1]))


def test_uncertainty_weighting_is_its_formula():
    balancer = _uncertainty()
    s, losses = balancer.log_vars.detach().double().numpy(), np.array(LOSSES)
    objective = balancer(torch.tensor(LOSSES, dtype=torch.float64))
    objective.backward()
    assert objective.item() == pytest.approx((0.5 * (np.exp(-s) * losses / 3 + s)).sum(), rel=1e-6)
    expected = 0.5 * (1 - np.exp(-s) * losses / 3)
    np.testing.assert_allclose(balancer.log_vars.grad, expected, rtol=1e-5)


class WithPrior(UncertaintyWeighting):
    """An objective of its own."""

    def forward(self, task_losses):
        return super().forward(task_losses) + self.log_vars.sum()


@pytest.mark.parametrize(
    "balancer", [LinearScalarization(3), _uncertainty(), _uncertainty(min_loss=0.05), WithPrior(3)]
)
def test_gradients_are_those_of_autograd(balancer):
    losses = torch.tensor(LOSSES)
    objective, gradients = balancer.differentiate(losses)
    own = list(balancer.parameters())
    expected = torch.autograd.grad(balancer(losses), own) if own else []
    assert not objective.requires_grad
    torch.testing.assert_close(objective, balancer(losses).detach())
    torch.testing.assert_close(gradients, list(expected))


def test_frozen_log_variances_have_no_gradient():
    balancer = _uncertainty()
    balancer.log_vars.requires_grad_(False)
    assert balancer.differentiate(torch.tensor(LOSSES))[1] == []


def _fit(balancer, losses, steps):
    optimizer = torch.optim.AdamW(balancer.parameters(), lr=balancer.lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        balancer(torch.tensor(losses)).backward()
        optimizer.step()


def test_min_loss_bounds_the_weight_and_the_log_variance_does_not_run_away():
    free, bounded = UncertaintyWeighting(2, lr=0.2), UncertaintyWeighting(2, lr=0.2, min_loss=0.1)
    for balancer in (free, bounded):
        _fit(balancer, [1e-6, 2.0], 100)
        assert balancer.loss_weights()[1].item() == pytest.approx(1 / (2 * 2.0), rel=1e-2)
    assert free.loss_weights()[0].item() > 1e4
    assert bounded.loss_weights()[0].item() == pytest.approx(1 / (2 * 0.1), rel=1e-2)
    assert bounded.log_vars[0].item() == pytest.approx(np.log(0.1 / 2), abs=1e-2)
    # When the loss comes back above the bound, so does its log-variance.
    _fit(bounded, [1.0, 2.0], 60)
    assert bounded.loss_weights()[0].item() == pytest.approx(1 / 2, rel=3e-2)


def test_below_the_bound_the_weight_stays_and_the_log_variance_turns_back():
    balancer = UncertaintyWeighting(2, min_loss=0.1)
    with torch.no_grad():
        balancer.log_vars.fill_(-20.0)
    balancer(torch.tensor([1e-6, 5.0])).backward()
    np.testing.assert_allclose(balancer.loss_weights(), 1 / (2 * 0.1), rtol=1e-6)
    assert (balancer.log_vars.grad < 0).all()  # descent raises both


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_model_keeps_the_balancers_precision(cast):
    balancers = [_uncertainty(), LinearScalarization(3, weights=[0.1, 0.2, 0.3]), PCGrad(3)]
    before = [copy.deepcopy(b.state_dict()) for b in balancers]
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), *balancers])
    model.to(cast)
    assert model[0].weight.dtype == cast
    for balancer, state in zip(balancers, before, strict=True):
        for name, value in balancer.state_dict().items():
            assert value.dtype == state[name].dtype
            assert torch.equal(value, state[name])
    assert balancers[0].log_vars.dtype == torch.float32
    losses = torch.tensor(LOSSES).to(cast)
    for balancer in balancers[:2]:
        assert balancer(losses).dtype == torch.promote_types(cast, torch.float32)


def test_a_balancer_moves_to_another_device_in_its_precision():
    balancer = _uncertainty().to("meta", torch.bfloat16)
    assert balancer.log_vars.device.type == "meta"
    assert balancer.log_vars.dtype == torch.float32


def test_state_is_saved():
    other = UncertaintyWeighting(3)
    other.load_state_dict(_uncertainty().state_dict())
    assert torch.equal(other.log_vars, torch.tensor([-1.0, 0.5, -6.0]))
    linear = LinearScalarization(3)
    linear.load_state_dict(LinearScalarization(3, weights=[1, 2, 3]).state_dict())
    assert linear.loss_weights().tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearScalarization(0), "num_tasks: .* found 0"),
        (lambda: LinearScalarization(3, weights=[1.0, 2.0]), "weights: must be 3 .* found"),
        (
            lambda: LinearScalarization(2, weights=[1.0, 0.0]),
            "weights: must be 2 positive .* found",
        ),
        (lambda: LinearScalarization(2, weights=[1.0, float("nan")]), "weights: .*nan"),
        (lambda: LinearScalarization(3)(torch.ones(2)), r"task_losses: .*\[3\], found \[2\]"),
        (lambda: UncertaintyWeighting(3)(torch.ones(3, 1)), "task_losses: .* found"),
        (lambda: UncertaintyWeighting(3, lr=0), "lr: .* found 0"),
        (lambda: UncertaintyWeighting(3, min_loss=-1), "min_loss: .* found -1"),
        (lambda: UncertaintyWeighting(3, min_loss=float("inf")), "min_loss: .* found inf"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
