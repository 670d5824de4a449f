"""The warning of a learned variance that a balancer would take for a hard task."""

import math
import warnings

import numpy as np
import pytest
import torch
from tiny_digits import module, trainer
from torch import nn

from ant_lightning import (
    DWA,
    EDM,
    FAMO,
    GLS,
    IMTLL,
    RLW,
    STCH,
    ContinuousUncertainty,
    CosineSchedule,
    DigitsData,
    DiscreteDiffusion,
    FlowMatching,
    GradNorm,
    GradVac,
    LinearScalarization,
    LinearSchedule,
    MultiTaskStep,
    NashMTL,
    PCGrad,
    SNRClustering,
    UncertaintyWeighting,
)
from ant_lightning.models.settings_checks import LearnedVarianceWarning, warn_of_learned_variance

K = 3
BALANCERS = {
    "linear": (LinearScalarization, False),
    "rlw": (RLW, False),
    "pcgrad": (PCGrad, False),
    "gradvac": (GradVac, False),
    "nash": (lambda k: NashMTL(k, update_every=1), False),
    "uw": (UncertaintyWeighting, True),
    "imtl": (IMTLL, True),
    "continuous_uw": (ContinuousUncertainty, True),
    "dwa": (lambda k: DWA(k, window=1), True),
    "gls": (GLS, True),
    "stch": (STCH, True),
    "famo": (FAMO, True),
    "gradnorm": (lambda k: GradNorm(k, initial_steps=1), True),
}


def said(process, balancer):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_learned_variance(process, SNRClustering(K)(process.log_snr), balancer)
    assert all(each.category is LearnedVarianceWarning for each in found)
    return [str(each.message) for each in found]


def weights_after(balancer, more):
    """Weights after steps in which task 0 has a constant more in its loss: the same gradients."""
    torch.manual_seed(0)
    network, x = nn.Linear(4, 1).double(), torch.randn(6, 4).double()
    tasks, log_snr = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([4.0, 4, 0, 0, -4, -4])
    step = MultiTaskStep(network, balancer)
    trained = [*network.parameters(), *balancer.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for number in range(4):

        def losses(rows, extra=more / (1 + number)):
            return (network(x[rows]).squeeze(1) - 1).square() + extra * (tasks[rows] == 0)

        step.backward(losses, tasks, log_snr=log_snr)
        optimizer.step()
        step.update()
    return balancer.task_weights


@pytest.mark.parametrize("name", BALANCERS)
def test_uses_losses_says_whether_the_weights_go_by_losses(name):
    make, expected = BALANCERS[name]
    balancer = make(K)
    assert (balancer.uses_losses or balancer.needs_losses) is expected
    with_more, without = (weights_after(make(K), more) for more in (100.0, 0.0))
    assert torch.allclose(with_more, without, rtol=1e-6) is not expected


@pytest.mark.parametrize("name", BALANCERS)
def test_only_balancers_that_go_by_losses_warn(name):
    make, expected = BALANCERS[name]
    process = DiscreteDiffusion(CosineSchedule(), variance_type="learned_range")
    assert len(said(process, make(K))) == expected
    assert said(process, None) == []


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        (DiscreteDiffusion(CosineSchedule(), variance_type="fixed_small"), False),
        (DiscreteDiffusion(LinearSchedule(), variance_type="learned_range"), False),
        (
            DiscreteDiffusion(CosineSchedule(), prediction_type="v", variance_type="learned_range"),
            False,
        ),
        # x_start predicted as 0 is far off where there is little noise.
        (
            DiscreteDiffusion(
                LinearSchedule(), prediction_type="x0", variance_type="learned_range"
            ),
            True,
        ),
        (FlowMatching(), False),
        (EDM(), False),
    ],
)
def test_the_arithmetic_of_the_schedule_decides(process, expected):
    assert len(said(process, UncertaintyWeighting(K))) == expected


def test_the_term_is_that_of_the_last_step_by_hand():
    """KL of the posterior from the model's step, for eps 0 and a variance between both bounds."""
    schedule = CosineSchedule()
    beta = DiscreteDiffusion(schedule).betas.double().numpy()
    alpha_bar = np.cumprod(1 - beta)
    before = alpha_bar[-2]
    posterior = beta[-1] * (1 - before) / (1 - alpha_bar[-1])
    variance = math.sqrt(beta[-1] * posterior)
    # mean = x_t / sqrt(alpha) - beta / sqrt(alpha (1 - alpha_bar)) eps, and eps has mean square 1.
    distance = beta[-1] ** 2 / ((1 - beta[-1]) * (1 - alpha_bar[-1]))
    nats = 0.5 * (math.log(variance / posterior) - 1 + (posterior + distance) / variance)
    bits = nats / math.log(2)
    (message,) = said(
        DiscreteDiffusion(schedule, variance_type="learned_range"), UncertaintyWeighting(K)
    )
    assert f"the variance term is {bits:.0f} at timestep 999, " in message
    assert "--model.process.variance_type fixed_small" in message


def test_a_run_warns_at_its_start_alone(tmp_path):
    model = module(balancer=UncertaintyWeighting(3))
    with pytest.warns(LearnedVarianceWarning, match="UncertaintyWeighting"):
        trainer(tmp_path, steps=1, limit_val_batches=0).fit(model, DigitsData(batch_size=30))
    with warnings.catch_warnings():
        warnings.simplefilter("error", LearnedVarianceWarning)
        trainer(tmp_path, steps=1, limit_val_batches=0).fit(model, DigitsData(batch_size=30))
