"""PCGrad: gradients that oppose each other are projected, in the space of their Gramian."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ant_lightning.balancing.base import GradientBalancer

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["PCGrad", "pcgrad_weights"]


def pcgrad_weights(
    gramian: Float[Tensor, "k k"], orders: Int[Tensor, "k m"]
) -> Float[Tensor, " k"]:
    """Weights of the gradients in the sum of the projected ones.

    Each task i starts with its own gradient `v_i = g_i` and meets the others in its own order:
    where `v_i . g_j < 0`, `v_i <- v_i - (v_i . g_j / ||g_j||^2) g_j` with the original `g_j`. Every
    `v_i` stays a combination of the gradients, so coefficients `C[i, j]` and the Gramian are
    enough. All tasks take a step at once; nothing waits for the device.

    Args:
        gramian: `G[i, j] = g_i . g_j`, `[k, k]`, floating point.
        orders: Row i lists whom task i meets, `[k, m]`. With `m >= k` itself may be on the list
            and is passed over (the official code projects on it); a zero gradient is never
            projected on.

    Returns:
        `w_j = sum_i C[i, j]`, `[k]`: 1 each without conflict, never less.

    Reference:
        Yu et al., "Gradient Surgery for Multi-Task Learning", algorithm 1, arXiv 2001.06782.
    """
    # Division by infinity: nobody is ever projected on a zero gradient.
    tiny = torch.finfo(gramian.dtype).tiny
    squared_norms = F.threshold(gramian.diagonal(), tiny, torch.inf)
    ratios = gramian / squared_norms[:, None]
    # v_i . g_j / ||g_j||^2 for every j that i meets, brought up to date as v_i changes. Few small
    # calls, since on a GPU the time is that of starting them.
    dots = ratios.mT.gather(1, orders)
    if orders.shape[1] >= len(gramian):  # somebody meets itself
        own = torch.arange(len(gramian), device=orders.device)[:, None]
        dots = dots.masked_fill(orders == own, torch.inf)
    between = ratios[orders[:, :, None], orders[:, None]].tril_(-1)  # of later ones and each
    for m, later in enumerate(between.unbind(2)[:-1]):
        dots.addcmul_(dots.narrow(1, m, 1).clamp_(max=0), later, value=-1)
    projections = torch.zeros_like(gramian).scatter_(1, orders, dots.clamp_(max=0))
    return 1 - projections.sum(0)


class PCGrad(GradientBalancer):
    """Weights 1/k times those of `pcgrad_weights`, each task in a fresh random order.

    The orders come from a generator of its own on the CPU, the same on all ranks; its state is
    part of the `state_dict`.

    Args:
        num_tasks: `k`.
        seed: Seed of the orders.

    Reference:
        Yu et al., "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782. The official
        code sums over tasks; the mean here is 1/k times that.
    """

    def __init__(self, num_tasks: int, *, seed: int = 0) -> None:
        super().__init__(num_tasks)
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def draw_orders(self) -> Int[Tensor, "k others"]:
        """A random order of the k - 1 others for each task, `[k, k-1]`, on the CPU."""
        k = self.num_tasks
        orders = torch.rand(k, k - 1, generator=self._generator).argsort(1)
        return orders + (orders >= torch.arange(k)[:, None])

    def solve(self, gramian: Float[Tensor, "k k"]) -> Float[Tensor, " k"]:
        """The weights of this step."""
        orders = self.draw_orders().to(gramian.device, non_blocking=True)
        return pcgrad_weights(gramian, orders) / self.num_tasks

    def get_extra_state(self) -> Tensor:
        """State of the generator (weights are refreshed in every step: there is no count)."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` gave."""
        self._generator.set_state(state.cpu())
