"""What each method does with extreme losses and gradients: the table of docs/reliability.md.

The network is linear, so gradients and losses are what a case says they are, and the expected
weights are formulas worked out by hand.
"""

from dataclasses import dataclass

import pytest
import torch

from ant_lightning import (
    ContinuousUncertainty,
    LinearScalarization,
    NashMTL,
    PCGrad,
    UncertaintyWeighting,
    multitask_backward,
)

METHODS = {
    "vanilla": lambda k: None,
    "linear": LinearScalarization,
    "uw": UncertaintyWeighting,
    "continuous_uw": ContinuousUncertainty,
    "pcgrad": PCGrad,
    "nash": NashMTL,
}


@dataclass
class Case:
    """Gradients `[k, d]`, losses `[k]` and samples `[k]` of the tasks; `k` times the weights."""

    rows: list
    losses: list
    pcgrad: list
    nash: list
    counts: tuple = (2, 2, 2)


def orthogonal(*norms):
    return [[norm * (i == j) for j in range(3)] for i, norm in enumerate(norms)]


RIDGE = 1e-6  # of Nash: gradients that oppose each other have weights up to 1 / sqrt(RIDGE)
CASES = {
    # Orthogonal: no conflict for PCGrad, and alpha_i = 1 / |g_i| for Nash.
    "ordinary": Case(orthogonal(1, 2, 4), [1.0, 0.5, 0.1], [1, 1, 1], [1, 1 / 2, 1 / 4]),
    "spike of 1e4": Case(
        orthogonal(1e4, 2e4, 4e4), [1e4, 5e3, 1e3], [1, 1, 1], [1e-4, 1e-4 / 2, 1e-4 / 4]
    ),
    "spike of 1e8": Case(
        orthogonal(1e8, 2e8, 4e8), [1e8, 5e7, 1e7], [1, 1, 1], [1e-8, 1e-8 / 2, 1e-8 / 4]
    ),
    # A task without a gradient takes the smallest of the others' weights.
    "zero gradient": Case(orthogonal(1, 0, 4), [1.0, 0.5, 0.1], [1, 1, 1], [1, 1 / 4, 1 / 4]),
    "no loss at all": Case(orthogonal(0, 0, 0), [0.0, 0.0, 0.0], [1, 1, 1], [1, 1, 1]),
    # v_0 = g_0 + g_1 = 0 and v_1 the same; b (1 + RIDGE - 1) b = 1 for both.
    "opposite": Case(
        [[3, 0, 0], [-3, 0, 0], [0, 0, 4]],
        [1.0, 0.5, 0.1],
        [2, 2, 1],
        [RIDGE**-0.5 / 3, RIDGE**-0.5 / 3, 1 / 4],
    ),
    # cosine -0.6: v_0 = g_0 + 0.6e8 g_1, v_1 = g_1 + 0.6e-8 g_0; b (1 - 0.6) b = 1 for both.
    "one task 1e8 times larger": Case(
        [[-0.6e8, 0.8e8, 0], [1, 0, 0], [0, 0, 1]],
        [1e8, 1.0, 1.0],
        [1 + 0.6e-8, 1 + 0.6e8, 1],
        [1e-8 * 0.4**-0.5, 0.4**-0.5, 1],
    ),
    # b (b + b + b) = 1.
    "equal samples": Case([[0, 2, 0]] * 3, [0.5] * 3, [1, 1, 1], [3**-0.5 / 2] * 3),
    "k = 1": Case([[0, 2, 0]], [0.5], [1], [1 / 2], counts=(4,)),
    "batch = 1": Case(orthogonal(1, 2, 4), [1.0, 0.5, 0.1], [1, 1, 1], [1 / 2] * 3, (0, 1, 0)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_weights_and_update_are_those_worked_out_by_hand(name, method):
    case = CASES[name]
    k, counts = len(case.rows), torch.tensor(case.counts)
    rows, losses = torch.tensor(case.rows).float(), torch.tensor(case.losses)
    tasks = torch.arange(k).repeat_interleave(counts)
    model, balancer = torch.nn.Linear(3, 1, bias=False), METHODS[method](k)
    torch.nn.init.zeros_(model.weight)  # the loss of a sample is its constant

    def losses_of(samples):
        return model(rows[tasks[samples]])[:, 0] + losses[tasks[samples]]

    log_snr = torch.zeros(len(tasks))
    report = multitask_backward(
        losses_of, tasks, model.parameters(), balancer, num_tasks=k, log_snr=log_snr
    )

    shares = (counts / counts.sum()).double()
    expected = {
        "vanilla": shares,
        "linear": torch.full((k,), 1 / k, dtype=torch.float64),
        "uw": torch.full((k,), 1 / (2 * k), dtype=torch.float64),  # at s = 0
        "continuous_uw": shares,  # at u = 0
        "pcgrad": torch.tensor(case.pcgrad, dtype=torch.float64) / k,
        "nash": torch.tensor(case.nash, dtype=torch.float64) / k,
    }[method]
    present = counts > 0
    terms = (expected * present)[:, None] * rows
    assert report.finite
    torch.testing.assert_close(report.task_weights, expected, rtol=2e-6, atol=0)
    # Float32 adds the terms up: what it loses is measured by the largest of them.
    limit = 2e-6 * float(terms.norm(dim=1).max())
    update = terms.sum(0).float()
    torch.testing.assert_close(model.weight.grad[0], update, rtol=0, atol=limit)
    assert float(report.grad_norm) == pytest.approx(float(update.norm()), rel=1e-5, abs=limit)
    assert torch.equal(report.task_losses.isnan(), ~present)
    assert float(report.objective) == pytest.approx(
        float((expected * present * losses).sum()), rel=1e-5
    )

    # Of the log-variances: 1 - loss, the loss bounded from below, all of them clipped together.
    if method == "uw":
        own = present * (1 - losses.clamp(min=1e-8) / k) / 2
        torch.testing.assert_close(balancer.log_vars.grad, own * min(1, 100 / float(own.norm())))
    if method == "continuous_uw":
        own = float((shares * (1 - losses.clamp(min=1e-8))).sum())
        features = (2 / 128) ** 0.5 * balancer.phases.cos()  # at log-SNR 0
        norm = abs(own) * (1 + float(features.square().sum())) ** 0.5
        assert float(balancer.bias.grad) == pytest.approx(own * min(1, 100 / norm), rel=1e-5)


def train(balancer, optimizer, loss, *, steps):
    """Steps on a loss that never changes; the task's weight after them."""
    model = torch.nn.Linear(1, 1, bias=False)
    for _ in range(steps):
        report = multitask_backward(
            lambda rows: model(torch.zeros(len(rows), 1))[:, 0] + loss,
            torch.zeros(1, dtype=torch.int64),
            model.parameters(),
            balancer,
            log_snr=torch.zeros(1),
        )
        assert report.finite
        optimizer.step()
    return float(report.task_weights)


@pytest.mark.parametrize(
    ("method", "settled", "steps"), [("uw", 1.0, 1000), ("continuous_uw", 2.0, 200)]
)
@pytest.mark.parametrize("factor", [pytest.param(1e4, marks=pytest.mark.slow), 1e8])
def test_a_learned_weight_is_back_after_a_spike(method, settled, steps, factor):
    balancer = METHODS[method](1)
    optimizer = torch.optim.AdamW(balancer.parameters(), lr=balancer.lr, weight_decay=0.0)
    # 1 / (2 L), or 1 / L.
    assert train(balancer, optimizer, 0.5, steps=200) == pytest.approx(settled, rel=0.02)
    train(balancer, optimizer, factor * 0.5, steps=1)
    assert train(balancer, optimizer, 0.5, steps=40) > settled / 20
    assert train(balancer, optimizer, 0.5, steps=steps) == pytest.approx(settled, rel=0.02)


@pytest.mark.parametrize("method", ["uw", "continuous_uw"])
def test_the_weight_of_a_task_without_any_loss_is_bounded(method):
    balancer = METHODS[method](1, lr=0.2)
    optimizer = torch.optim.AdamW(balancer.parameters(), lr=0.2, weight_decay=0.0)
    limit = 1e8 if method == "continuous_uw" else 1e8 / 2
    assert train(balancer, optimizer, 0.0, steps=300) == pytest.approx(limit, rel=0.01)
