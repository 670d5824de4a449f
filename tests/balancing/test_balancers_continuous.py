"""Continuous uncertainty: formula, gradients of the step, and the limit of many clusters."""

import numpy as np
import pytest
import torch

from ant_lightning import (
    ConfigError,
    ContinuousUncertainty,
    UncertaintyWeighting,
    multitask_backward,
)


def loss_at(log_snr):
    """A loss that rises with the noise by two orders of magnitude."""
    return 1.2 * torch.sigmoid(-log_snr / 2) + 0.01


def random_balancer(num_tasks=3, **settings):
    balancer = ContinuousUncertainty(num_tasks, **settings)
    with torch.no_grad():
        balancer.weight.normal_(generator=torch.Generator().manual_seed(1))
        balancer.bias.fill_(0.3)
    return balancer


def test_it_starts_unweighted():
    log_snr = torch.linspace(-12, 12, 9)
    balancer = ContinuousUncertainty(3)
    assert torch.equal(balancer.sample_weights(log_snr), torch.ones(9))
    losses = torch.rand(9)
    assert torch.equal(balancer(losses, log_snr), losses)


def test_the_derivative_of_a_term_is_the_weight_whatever_the_loss():
    balancer, log_snr = random_balancer(), torch.linspace(-9, 9, 7)
    weights = balancer.sample_weights(log_snr)
    u = balancer.log_variance(log_snr).detach().double().numpy()
    assert u.std() > 0.3
    for scale in (1e-3, 10.0):
        losses = (scale * torch.rand(7)).requires_grad_()
        terms = balancer(losses, log_snr)
        expected = np.exp(-u) * losses.detach().numpy() + u
        np.testing.assert_allclose(terms.detach(), expected, rtol=1e-5)
        (derivative,) = torch.autograd.grad(terms.sum(), losses)
        np.testing.assert_allclose(derivative, weights, rtol=1e-5)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("priors", [None, torch.tensor([0.5, 0.3, 0.2])])
def test_the_step_is_the_gradient_of_the_objective(micro_batch_size, priors):
    torch.manual_seed(0)
    x, target = torch.randn(10, 4), torch.randn(10)
    tasks, log_snr = torch.arange(10) % 3, torch.linspace(-5, 5, 10)
    model, balancer = torch.nn.Linear(4, 1), random_balancer()

    def losses(rows):
        return (model(x[rows])[:, 0] - target[rows]).square()

    report = multitask_backward(
        losses,
        tasks,
        model.parameters(),
        balancer,
        priors=priors,
        micro_batch_size=micro_batch_size,
        log_snr=log_snr,
        loss_scale=2.0,
    )
    scale = torch.ones(10) if priors is None else (3 * priors)[tasks]
    every = losses(torch.arange(10))
    objective = balancer(every * scale, log_snr).mean()
    inputs = [*model.parameters(), *balancer.parameters()]
    expected = torch.autograd.grad(objective, inputs)
    for p, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient, rtol=1e-4, atol=1e-6)
    assert report.objective.item() == pytest.approx(objective.item(), rel=1e-5)
    norm = torch.cat([g.flatten() for g in expected[:2]]).norm().item()
    assert report.grad_norm.item() == pytest.approx(norm, rel=1e-4)
    weights = balancer.sample_weights(log_snr).double() * scale / 10
    by_task = torch.stack([weights[tasks == i].sum() for i in range(3)])
    torch.testing.assert_close(report.task_weights, by_task)
    torch.testing.assert_close(balancer.task_weights, by_task)


def test_a_loss_that_is_not_finite_leaves_it_as_it_was():
    model, balancer = torch.nn.Linear(2, 1), random_balancer()
    before = balancer.task_weights.clone()
    report = multitask_backward(
        lambda rows: model(torch.ones(len(rows), 2))[:, 0] * torch.nan,
        torch.arange(3),
        model.parameters(),
        balancer,
        log_snr=torch.zeros(3),
    )
    assert not report.finite
    assert balancer.weight.grad is None
    assert torch.equal(balancer.task_weights, before)


def _fit_continuous():
    balancer, levels = ContinuousUncertainty(1), torch.linspace(-9, 9, 256)
    optimizer = torch.optim.LBFGS(balancer.parameters(), max_iter=200)  # convex

    def closure():
        optimizer.zero_grad()
        objective = balancer(loss_at(levels), levels).mean()
        objective.backward()
        return objective

    optimizer.step(closure)
    return balancer


def test_uncertainty_weighting_tends_to_it_as_clusters_become_narrow():
    continuous = _fit_continuous()
    levels = torch.linspace(-9, 9, 1024)
    # Its own optimum: weight 1 / L at every noise level.
    own = continuous.sample_weights(levels) * loss_at(levels)
    np.testing.assert_allclose(own, 1.0, rtol=0.03)
    errors = []
    for k in (2, 8, 32):
        losses = loss_at(levels).view(k, -1).mean(1)
        balancer = UncertaintyWeighting(k, lr=0.1)
        optimizer = torch.optim.Adam(balancer.parameters(), lr=balancer.lr)
        for _ in range(400):
            optimizer.zero_grad()
            balancer(losses).backward()
            optimizer.step()
        # 2 w_i: UW's equilibrium is 1 / (2 L_i) for the sum over tasks.
        ratio = 2 * balancer.loss_weights().repeat_interleave(1024 // k)
        errors.append((ratio / continuous.sample_weights(levels)).log().abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.2


def test_casts_keep_its_precision_and_state_is_saved():
    balancer = random_balancer()
    before = balancer.log_variance(torch.linspace(-5, 5, 4))
    torch.nn.ModuleList([balancer]).to(torch.bfloat16)
    other = ContinuousUncertainty(3)
    other.load_state_dict(balancer.state_dict())
    assert torch.equal(other.log_variance(torch.linspace(-5, 5, 4)), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ContinuousUncertainty(3, lr=0), "lr: .* found 0"),
        (lambda: ContinuousUncertainty(3, num_features=0), "num_features: .* found 0"),
        (lambda: _step(None), "log_snr: .* each of the 3 samples, found None"),
        (lambda: _step(torch.zeros(2)), r"log_snr: .* found \[2\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def _step(log_snr):
    model = torch.nn.Linear(1, 1)
    multitask_backward(
        lambda rows: model(torch.ones(len(rows), 1))[:, 0],
        torch.arange(3),
        model.parameters(),
        ContinuousUncertainty(3),
        log_snr=log_snr,
    )


def test_it_stays_in_float32_under_autocast():
    balancer = ContinuousUncertainty(3)
    torch.nn.init.normal_(balancer.weight, generator=torch.Generator().manual_seed(0))
    log_snr = torch.linspace(-10, 10, 50)
    exact = balancer.log_variance(log_snr)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(balancer.log_variance(log_snr), exact)
