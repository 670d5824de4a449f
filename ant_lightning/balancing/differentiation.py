"""Differentiation and sums over ranks, for whole parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.gradients import (
    DenseTaskGradients,
    assign_gradients,
    reduce_gradients_,
)
from ant_lightning.balancing.reduced import ReducedTaskGradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ant_lightning.balancing.reduction import Reduction

__all__ = ["Differentiation"]


class Differentiation:
    """Differentiates parameters that each rank has as a whole.

    No pass is collective, so ranks may make different numbers of passes.

    Args:
        parameters: What losses are differentiated with respect to.
        reduction: How sums over ranks are made.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], reduction: Reduction) -> None:
        self.parameters = parameters
        self.reduction = reduction

    def new_rows(self, num_tasks: int) -> DenseTaskGradients:
        """Buffers for the gradients of `k` tasks."""
        kind = DenseTaskGradients if self.reduction.world_size == 1 else ReducedTaskGradients
        return kind(num_tasks, self.parameters, reduction=self.reduction)

    def num_passes(self, counts: Sequence[int], size: int | None) -> list[int]:
        """Number of passes over each group, of at most `size` samples each.

        Args:
            counts: Number of samples of each group.
            size: Largest number of samples in a pass; `None` for no limit.
        """
        return [-(-count // (size or max(count, 1))) for count in counts]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Gradient of each parameter on this rank; add up those of all passes for `finish`."""
        # Not `backward`: it runs the hooks on the leaves in which DistributedDataParallel reduces.
        found = torch.autograd.grad(
            loss, self.parameters, allow_unused=True, materialize_grads=True
        )
        # An embedding with `sparse=True` has sparse gradients; rows and sums over ranks are dense.
        return [g.to_dense() if g.is_sparse else g for g in found]

    def finish(self, gradients: Sequence[Tensor]) -> Tensor:
        """Write the sum over ranks into `.grad` and return its L2 norm."""
        assign_gradients(self.parameters, gradients)
        reduce_gradients_(self.parameters, reduction=self.reduction)
        return torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None]
        )
