"""MinSNR and P2 weigh the timesteps inside a task, under every balancer."""

import pytest
import tiny_digits
import torch

from ant_lightning import (
    P2,
    Batch,
    ContinuousUncertainty,
    DiT,
    LinearScalarization,
    MinSNR,
    NashMTL,
    PCGrad,
    UncertaintyWeighting,
    multitask_backward,
)
from ant_lightning.models.draws import Draws

K = 3
BALANCERS = {
    "vanilla": lambda: None,
    "linear": lambda: LinearScalarization(K),
    "uw": lambda: UncertaintyWeighting(K),
    "continuous": lambda: ContinuousUncertainty(K),
    "pcgrad": lambda: PCGrad(K),
    "nash": lambda: NashMTL(K),
}


def network():
    torch.manual_seed(0)
    size = {"hidden_size": 8, "depth": 1, "num_heads": 1}
    made = DiT(input_size=8, patch_size=4, in_channels=1, num_classes=0, learn_sigma=False, **size)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


@pytest.mark.parametrize("weighting", [MinSNR(), P2()], ids=["min_snr", "p2"])
@pytest.mark.parametrize("balancer", BALANCERS)
def test_the_balancer_sees_weighted_losses_and_their_gradients(balancer, weighting):
    module = tiny_digits.module(
        loss_weighting=weighting,
        balancer=BALANCERS[balancer](),
        prediction_type="v",
        variance_type="fixed_small",
        backbone=network(),
    )
    generator = torch.Generator().manual_seed(0)
    x_start = torch.randn(30, 1, 8, 8, generator=generator)
    timesteps, tasks = module.clusters.sample(30, generator=generator)
    noise = torch.randn(x_start.shape, generator=generator)
    batch = Batch(x_start, torch.zeros(30, dtype=torch.long), torch.arange(30))
    losses = module.losses(x_start, Draws(timesteps, timesteps, tasks, noise, batch.labels))
    shared = list(module.backbone.parameters())
    report = multitask_backward(
        losses,
        tasks,
        shared,
        module.balancer,
        num_tasks=K,
        log_snr=module.process.log_snr[timesteps],
    )
    snr = module.process.snr
    inside = (snr.clamp(max=5) if isinstance(weighting, MinSNR) else snr / (1 + snr)) / (snr + 1)
    assert inside.max() / inside.min() > 5  # the weighting does something
    weighted = inside[timesteps] * report.aux.double()
    means = torch.stack([weighted[tasks == i].mean() for i in range(K)])
    torch.testing.assert_close(report.task_losses, means, rtol=1e-4, atol=1e-7)
    if balancer != "continuous":  # the others weigh a task's samples alike
        objective = sum(
            w * losses(torch.nonzero(tasks == i)[:, 0])[0].mean()
            for i, w in enumerate(report.task_weights.tolist())
        )
        trained = [p for p in shared if p.requires_grad]
        expected = torch.autograd.grad(objective, trained)
        for p, gradient in zip(trained, expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)
