"""GradVac: raises the cosines between task gradients to their running means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ant_lightning.balancing.pcgrad import PCGrad
from ant_lightning.errors import check_range

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def gradvac_weights(
    gramian: Float[Tensor, "k k"],
    targets: Float[Tensor, "k k"],
    orders: Int[Tensor, "k m"],
    *,
    beta: float = 0.5,
    eps: float = 1e-8,
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k k"]]:
    """Weights of the sum of GradVac's gradients, and the next targets.

    Task i starts with `v_i = g_i` and visits the others in the order `orders[i]`. If the cosine
    `phi` of `v_i` and `g_j` is below the target `t = targets[i, j]`, `v_i` gains
    `|v_i| (t sqrt(1 - phi^2) - phi sqrt(1 - t^2)) / (|g_j| sqrt(1 - t^2)) g_j`, after which the
    cosine is `t`. The next target is `(1 - beta) t + beta phi`.

    Args:
        gramian: `G[i, j] = g_i . g_j`, `[k, k]`.
        targets: Running means of the cosines, `[k, k]`.
        orders: Row i has the tasks that task i visits, without i, `[k, m]`.
        beta: Share of the new cosine in a running mean.
        eps: Added to denominators.

    Reference:
        Wang et al., "Gradient Vaccine", algorithm 1, arXiv 2010.05874.

    Examples:
        >>> gramian = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
        >>> gradvac_weights(gramian, torch.zeros(2, 2), torch.tensor([[1], [0]]))[0]
        tensor([1.5000, 1.5000])
    """
    rows = torch.arange(len(gramian), device=gramian.device)
    parts = torch.eye(len(gramian), dtype=gramian.dtype, device=gramian.device)
    targets = targets.clone()
    norms = gramian.diagonal().clamp(min=0).sqrt()
    for others in orders.unbind(1):
        dots = parts @ gramian  # v_i . g_j
        own = (dots * parts).sum(1).clamp(min=0).sqrt()
        cosines = dots[rows, others] / (own * norms[others] + eps)
        wanted = targets[rows, others]
        sine, wanted_sine = ((1 - c.square()).clamp(min=0).sqrt() for c in (cosines, wanted))
        gain = own * (wanted * sine - cosines * wanted_sine) / (norms[others] * wanted_sine + eps)
        parts[rows, others] += torch.where(cosines < wanted, gain, 0)
        targets[rows, others] = (1 - beta) * wanted + beta * cosines
    return parts.sum(0), targets


class GradVac(PCGrad):
    """GradVac: raises the cosine between two task gradients to its running mean, in random order.

    The weights are 1/k times those of `gradvac_weights`. PCGrad is the case of targets 0.

    Args:
        num_tasks: Number of tasks `k`.
        beta: Share of the new cosine in a running mean.
        seed: Seed of the orders.

    Raises:
        ConfigError: If `beta` is outside of [0, 1].

    Reference:
        Wang et al., "Gradient Vaccine", arXiv 2010.05874; there the sum over tasks.

    Examples:
        >>> GradVac(num_tasks=2)(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        tensor([0.7500, 0.7500], dtype=torch.float64)
    """

    targets: Tensor

    def __init__(self, num_tasks: int, *, beta: float = 0.5, seed: int = 0) -> None:
        super().__init__(num_tasks, seed=seed)
        check_range(0, 1, beta=beta)
        self.beta = beta
        self.register_buffer("targets", torch.zeros(num_tasks, num_tasks, dtype=torch.float64))

    def solve(self, gramian: Float[Tensor, "k k"]) -> Float[Tensor, " k"]:
        """The weights of this step; moves the running means."""
        orders = self.draw_orders().to(gramian.device, non_blocking=True)
        targets = self.targets.to(gramian, non_blocking=True)
        weights, self.targets = gradvac_weights(gramian, targets, orders, beta=self.beta)
        return weights / self.num_tasks
