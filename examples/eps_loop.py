"""A plain PyTorch loop that predicts noise, with PCGrad over five clusters of timesteps.

Run it with `python examples/eps_loop.py`. It needs no Lightning: `MultiTaskStep` replaces
`loss.backward()`.
"""

import torch
from torch import nn

from ant_lightning import (
    CosineSchedule,
    DiscreteDiffusion,
    MultiTaskStep,
    PCGrad,
    SNRClustering,
)


class Denoiser(nn.Module):
    """Predicts the noise in points of the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.head = nn.Linear(64, 2)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Predict the noise `[b, 2]` in points `[b, 2]` at timesteps `[b]`."""
        time = t[:, None] / 1000
        return self.head(self.layers(torch.cat([x_t, time], dim=1)))


def two_moons(count: int, generator: torch.Generator) -> torch.Tensor:
    """Points on two half circles, `[count, 2]`."""
    angle = torch.rand(count, generator=generator) * torch.pi
    side = torch.randint(0, 2, (count,), generator=generator)
    x = torch.where(side == 0, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(side == 0, angle.sin(), 0.5 - angle.sin()) - 0.25
    return torch.stack([x, y], dim=1)


def train(num_steps: int = 500, batch_size: int = 250) -> list[float]:
    """Train; returns the loss of every step."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    process = DiscreteDiffusion(CosineSchedule())
    clusters = SNRClustering(num_tasks=5)(process.log_snr)
    step = MultiTaskStep(model, PCGrad(num_tasks=5))
    history = []
    for _ in range(num_steps):
        x_start = two_moons(batch_size, generator)
        noise = torch.randn(x_start.shape, generator=generator)
        t, tasks = clusters.sample(batch_size, generator=generator)
        x_t = process.q_sample(x_start, t, noise)

        def losses(rows: torch.Tensor) -> torch.Tensor:
            return (model(x_t[rows], t[rows]) - noise[rows]).square().mean(1)

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
