"""A plain flow-matching loop, time in [0, 1], with uncertainty weighting over five clusters.

The clusters are intervals of a grid over [0, 1], grouped by the log signal-to-noise ratio of the
straight path x_t = (1 - t) x_0 + t noise. A time is drawn uniformly inside its grid cell.
"""

import torch
from eps_loop import Denoiser, two_moons

from ant_lightning import MultiTaskStep, SNRClustering, UncertaintyWeighting

NUM_CELLS = 200


def train(num_steps: int = 500, batch_size: int = 250) -> list[float]:
    """Train; returns the loss of every step."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Denoiser()
    balancer = UncertaintyWeighting(num_tasks=5)
    groups = [
        {"params": model.parameters(), "lr": 1e-3},
        {"params": balancer.parameters(), "lr": balancer.lr},
    ]
    optimizer = torch.optim.Adam(groups)
    step = MultiTaskStep(model, balancer)
    centres = (torch.arange(NUM_CELLS, dtype=torch.float64) + 0.5) / NUM_CELLS
    clusters = SNRClustering(num_tasks=5)(2 * torch.log((1 - centres) / centres))
    history = []
    for _ in range(num_steps):
        x_start = two_moons(batch_size, generator)
        noise = torch.randn(x_start.shape, generator=generator)
        cells, tasks = clusters.sample(batch_size, generator=generator)
        t = (cells + torch.rand(batch_size, generator=generator)) / NUM_CELLS
        x_t = (1 - t[:, None]) * x_start + t[:, None] * noise
        velocity = noise - x_start

        def losses(rows: torch.Tensor) -> torch.Tensor:
            return (model(x_t[rows], 1000 * t[rows]) - velocity[rows]).square().mean(1)

        report = step.backward(losses, tasks)
        if report.finite:
            optimizer.step()
        step.update()
        history.append(float(report.task_losses.mean()))
    return history


if __name__ == "__main__":
    losses = train()
    for step in range(0, len(losses), 50):
        print(f"step {step:4d}  mean loss of the tasks {losses[step]:.3f}")
