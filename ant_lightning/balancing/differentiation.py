"""Differentiation and sums over ranks, for whole parameters."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.buckets import memory_strides
from ant_lightning.balancing.gradients import (
    DenseTaskGradients,
    assign_gradients,
    reduce_gradients_,
    sums_dtype,
)
from ant_lightning.balancing.overlap import GradientBuckets
from ant_lightning.balancing.parameters import is_dense, same_tensors
from ant_lightning.balancing.reduced_gradients import ReducedTaskGradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ant_lightning.balancing.reduction import Reduction


class Differentiation:
    """Differentiates parameters that each rank has as a whole.

    No pass is collective, so ranks may make different numbers of passes. Keep the object for a
    run: it holds the buckets in which gradients travel.

    Args:
        parameters: What losses are differentiated with respect to.
        reduction: How sums over ranks are made.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], reduction: Reduction) -> None:
        self.parameters = parameters
        self.reduction = reduction
        self.buckets: GradientBuckets | None = None
        self.known_order: Sequence[int] = ()  # for the first buckets, that of an earlier run
        self._sending = False

    def bind(self, parameters: Sequence[nn.Parameter]) -> None:
        """Use these parameters from now on: some may have been frozen or thawed."""
        self.parameters = parameters
        self._sending = False

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
        return _owned(found, self.parameters)

    def last_gradients(self, loss: Tensor, before: Sequence[Tensor] = ()) -> list[Tensor]:
        """Gradients of the last pass of a step, plus `before`, the sum of those of the others.

        On several ranks their sums over ranks have started while the pass went on; only `finish`
        may read them.
        """
        if self.reduction.world_size == 1:
            found = self.gradients(loss)
            if before:
                torch._foreach_add_(found, list(before))
            return found
        buckets = self.buckets
        if (
            buckets is None
            or not same_tensors(buckets.parameters, self.parameters)
            or buckets.dtype != sums_dtype(self.parameters)  # after a cast
        ):
            known, self.known_order = self.known_order, ()
            buckets = self.buckets = GradientBuckets(self.parameters, self.reduction, known)
        buckets.begin(before)
        # Hooks on leaves run in `grad` too, once for each, with the sum over all uses. They are
        # registered after the forward pass, where a compiled network would have to trace them.
        hooks = [
            p.register_hook(partial(buckets.receive, index))
            for index, p in enumerate(self.parameters)
        ]
        try:
            torch.autograd.grad(loss, self.parameters, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        self._sending = True
        return []

    def finish(self, gradients: Sequence[Tensor]) -> Tensor:
        """Write the sum over ranks into `.grad` and return its L2 norm."""
        if self._sending and self.buckets is not None:
            self._sending = False
            assign_gradients(self.parameters, self.buckets.finish())
        else:
            assign_gradients(self.parameters, gradients)
            reduce_gradients_(self.parameters, reduction=self.reduction)
        return torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None]
        )


def _owned(found: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradients that may be written to, each in memory of its own.

    An embedding with `sparse=True` has a sparse gradient. That of a sum is one number, expanded,
    and `a + b` gives both the same tensor.
    """
    owned, memory = [], set[int]()
    for gradient, p in zip(found, parameters, strict=True):
        g = gradient.to_dense() if gradient.is_sparse else gradient
        place = g.untyped_storage()._cdata
        if not is_dense(g) or place in memory:
            g = torch.empty_strided(g.shape, memory_strides(p), dtype=g.dtype, device=g.device)
            g.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
        memory.add(place)
        owned.append(g)
    return owned
