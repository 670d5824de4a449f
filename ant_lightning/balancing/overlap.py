"""Sums of whole gradients over ranks, which travel while the backward pass goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.buckets import ArrivalOrder, arranged, views_of
from ant_lightning.balancing.gradients import sums_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from ant_lightning.balancing.reduction import Reduction

# Bytes of a bucket and of the first one, as in DistributedDataParallel: large enough for the full
# speed of a network, small enough that most have left before the pass is over.
_BYTES, _FIRST_BYTES = 25 << 20, 1 << 20


class GradientBuckets:
    """Gradients of whole parameters, copied into buckets that are all-reduced one by one.

    Each gradient is copied into its place in a bucket as soon as it arrives. A full bucket leaves
    at once, in one order on all ranks: that of the parameters backwards in the first step, and
    then the order of arrival in the first step on rank 0. Sums are float32 at least, since a sum
    in bfloat16 would round at every rank. (A gradient cannot be sent from where it is: an
    all-reduce overwrites it, and autograd may need the same memory again, as for `a` in `a + b`.)

    Args:
        parameters: The parameters, which each rank has as a whole.
        reduction: How sums over ranks are made.
        known: The order of arrival in an earlier run, if it is known.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        reduction: Reduction,
        known: Sequence[int] = (),
    ) -> None:
        self.parameters = list(parameters)
        self.dtype = sums_dtype(parameters)
        self._reduction = reduction
        self.order = ArrivalOrder(len(self.parameters), reduction, known)
        self._arrange()

    def _arrange(self) -> None:
        """Make the buckets, for the order that is known now."""
        size = self.dtype.itemsize
        self._buckets = arranged(
            [p.numel() for p in self.parameters],
            self.order.indices,
            capacity=_BYTES // size,
            first=_FIRST_BYTES // size,
        )
        device = self.parameters[0].device
        self._flats, self._place = [], {}
        views: dict[int, Tensor] = {}
        for place, bucket in enumerate(self._buckets):
            flat = torch.empty(bucket.length, dtype=self.dtype, device=device)
            members = [self.parameters[index] for index in bucket.members]
            views.update(zip(bucket.members, views_of(flat, members), strict=True))
            self._place.update(dict.fromkeys(bucket.members, place))
            self._flats.append(flat)
        self._views = [views[index] for index in range(len(self.parameters))]

    def begin(self, before: Sequence[Tensor] = ()) -> None:
        """Begin the last backward pass of a step.

        Args:
            before: Sum of the gradients of earlier passes, one for each parameter, if there were.
        """
        if self.order.agree(self.parameters[0].device):
            self._arrange()
        self.order.begin()
        self._before = before
        self._arrived: set[int] = set()
        self._missing = [len(bucket.members) for bucket in self._buckets]
        self._waits: list[Callable[[], None]] = []

    def receive(self, index: int, gradient: Tensor | None) -> Tensor | None:
        """Take the gradient of a parameter, and send what is full; the hook of a parameter.

        Returns:
            A tensor of the same shape in one number, so that autograd frees the gradient; `None`
            if it has to keep it.
        """
        if gradient is None:  # of an operation that has none for this parameter
            return None
        self.order.arrived(index)
        sparse = gradient.is_sparse
        if sparse:  # autograd wants a sparse result for it, but sums are dense
            gradient = gradient.to_dense()
        self._take(index, gradient)
        return None if sparse else gradient.new_zeros(()).expand_as(gradient)

    def _take(self, index: int, gradient: Tensor | None) -> None:
        """Put a gradient into its bucket; `None` is zero."""
        view = self._views[index]
        if gradient is None:
            view.zero_()
        else:
            view.copy_(gradient)
        if self._before:
            view.add_(self._before[index])
        self._arrived.add(index)
        self._missing[self._place[index]] -= 1
        while len(self._waits) < len(self._buckets) and not self._missing[len(self._waits)]:
            self._waits.append(self._reduction.start_all_reduce_(self._flats[len(self._waits)]))

    def finish(self) -> list[Tensor]:
        """Send what has no gradient as zeros; wait, and return the sums, one a parameter.

        They are views into the buckets, which the next step overwrites.
        """
        for bucket in self._buckets:
            for index in bucket.members:
                if index not in self._arrived:
                    self._take(index, None)
        for wait in self._waits:
            wait()
        self._before = ()
        return self._views
