"""PCGrad: projects conflicting gradients, computed from their Gramian alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ant_lightning.balancing.base import GradientBalancer

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def pcgrad_weights(
    gramian: Float[Tensor, "k k"], orders: Int[Tensor, "k m"]
) -> Float[Tensor, " k"]:
    """Weights `w` such that `sum_j w_j g_j` is the sum of PCGrad's projected gradients.

    Task i starts with its own gradient `v_i = g_i` and visits the other tasks in the order
    `orders[i]`. If `v_i . g_j < 0`, `v_i` is projected onto the plane orthogonal to the original
    `g_j`: `v_i <- v_i - (v_i . g_j / ||g_j||^2) g_j`. Each `v_i` is a combination of the
    gradients, so its coefficients `C[i, j]` and the Gramian are enough. All tasks are projected at
    once, and the host does not wait for the device.

    Args:
        gramian: `G[i, j] = g_i . g_j`, `[k, k]`, floating point.
        orders: Row i has the tasks that task i visits, `[k, m]`. Task i itself is skipped if its
            row has it (the official code projects on it), and so are tasks with a zero gradient.

    Returns:
        `w_j = sum_i C[i, j]`, `[k]`: 1 each without conflicts, and never below 1.

    Reference:
        Yu et al., "Gradient Surgery for Multi-Task Learning", algorithm 1, arXiv 2001.06782.

    Examples:
        Two gradients of length 1 at an angle of 120 degrees conflict; each is projected.

        >>> gramian = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
        >>> pcgrad_weights(gramian, orders=torch.tensor([[1], [0]]))
        tensor([1.5000, 1.5000])
    """
    # The squared norm of a zero gradient is set to infinity: its ratios are then 0, which is no
    # conflict, and not 0 / 0.
    tiny = torch.finfo(gramian.dtype).tiny
    squared_norms = F.threshold(gramian.diagonal(), tiny, torch.inf)
    ratios = gramian / squared_norms[:, None]
    # dots[i, m] = v_i . g_j / ||g_j||^2 for j = orders[i, m], updated as v_i changes. On a GPU the
    # launches of kernels take the time, so one launch projects all tasks.
    dots = ratios.mT.gather(1, orders)
    if orders.shape[1] >= len(gramian):  # a row may have its own task
        own = torch.arange(len(gramian), device=orders.device)[:, None]
        dots = dots.masked_fill(orders == own, torch.inf)
    # between[i, a, b] = g_a . g_b / ||g_a||^2 for the a-th and b-th task that i visits, if a comes
    # after b. Projecting v_i on the b-th changes dots[i, a] by -min(dots[i, b], 0) times this. It
    # is 0 for a <= b: an entry of `dots` that was projected already does not change.
    between = ratios[orders[:, :, None], orders[:, None]].tril_(-1)
    for m, later in enumerate(between.unbind(2)[:-1]):
        dots.addcmul_(dots.narrow(1, m, 1).clamp_(max=0), later, value=-1)
    # C = I - projections, and the sum of the projected gradients takes the sums of its columns.
    projections = torch.zeros_like(gramian).scatter_(1, orders, dots.clamp_(max=0))
    return 1 - projections.sum(0)


class PCGrad(GradientBalancer):
    """PCGrad: removes from each task's gradient what conflicts with other tasks, in random order.

    The weights are 1/k times those of `pcgrad_weights`. The orders come from the balancer's own
    generator on the CPU. All ranks seed it alike and so draw the same orders; its state is part of
    the `state_dict`.

    Args:
        num_tasks: Number of tasks `k`.
        seed: Seed of the orders.

    Reference:
        Yu et al., "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782. The official
        code sums over tasks; the mean here is 1/k times that.

    Examples:
        >>> balancer = PCGrad(num_tasks=2)
        >>> balancer(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        tensor([0.7500, 0.7500], dtype=torch.float64)
        >>> balancer(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))     # no conflict: the mean
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, num_tasks: int, *, seed: int = 0) -> None:
        super().__init__(num_tasks)
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def draw_orders(self) -> Int[Tensor, "k others"]:
        """A random order of the k - 1 others for each task, `[k, k-1]`, on the CPU."""
        k = self.num_tasks
        orders = torch.rand(k, k - 1, generator=self._generator).argsort(1)
        # Numbers from i on move up by 1, which leaves out task i itself.
        return orders + (orders >= torch.arange(k)[:, None])

    def solve(self, gramian: Float[Tensor, "k k"]) -> Float[Tensor, " k"]:
        """The weights of this step."""
        orders = self.draw_orders().to(gramian.device, non_blocking=True)
        return pcgrad_weights(gramian, orders) / self.num_tasks

    def get_extra_state(self) -> Tensor:
        """State of the generator. Weights are refreshed in every step, so no count is kept."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state of `get_extra_state`."""
        self._generator.set_state(state.cpu())
