"""Sums over the samples of each group of a batch."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

__all__ = ["Groups"]


class Groups:
    """The groups of a batch; group i has the samples `starts[i] .. starts[i + 1] - 1`.

    Groups of equal size are summed in one call. If at most half of the groups are longer than the
    shortest, the batch is reordered: first the even part, which has as many samples of each group
    as the shortest group has; then the surplus of each longer group. One call sums the even part,
    and one call each surplus. Otherwise each group takes one call.

    Attributes:
        sizes: Number of samples of each group.
        order: Original position of each sample in the new order, `[b]`.
    """

    def __init__(self, starts: Sequence[int]) -> None:
        self.sizes = [stop - start for start, stop in pairwise(starts)]
        spans = list(pairwise(starts))
        shortest = min(self.sizes)
        num_longer = sum(size > shortest for size in self.sizes)
        shared = 2 * num_longer <= len(self.sizes) and len(self.sizes) > 1
        self._even = shortest if shared else 0  # samples of each group in the even part
        # Of each group, the samples behind the even part: all of them if there is none.
        rests = [(group, start + self._even, stop) for group, (start, stop) in enumerate(spans)]
        rests = [rest for rest in rests if rest[1] < rest[2]]
        pieces = [torch.arange(start, start + self._even) for start, _ in spans]
        pieces += [torch.arange(start, stop) for _, start, stop in rests]
        self.order = torch.cat(pieces)
        # As for `order`: the caller sorts the samples by group, and `layout` reorders them.
        self._of_samples = torch.repeat_interleave(torch.tensor(self.sizes))[self.order]
        self._rests: list[tuple[int, slice]] = []
        place = self._even * len(self)
        for group, start, stop in rests:
            self._rests.append((group, slice(place, place + stop - start)))
            place += stop - start

    def __len__(self) -> int:
        return len(self.sizes)

    def by_group(self, samples: Tensor) -> Tensor:
        """Reorder `samples [b]`, which are sorted by group."""
        return samples[self.order.to(samples.device)]

    def of_samples(self, device: torch.device) -> Tensor:
        """The group of each sample, `[b]`."""
        return self._of_samples.to(device, non_blocking=True)

    def pieces(self) -> Iterator[tuple[int, slice]]:
        """Pairs of a group and a slice of its samples; a longer group has two slices."""
        for group in range(len(self) if self._even else 0):
            yield group, slice(group * self._even, (group + 1) * self._even)
        yield from self._rests

    def _evenly(self, values: Tensor) -> Tensor:
        """The even part of `values [b, ...]`, as `[m, even, ...]`."""
        if self._rests:
            values = values[: self._even * len(self)]
        return values.view(len(self), self._even, *values.shape[1:])

    def sums(
        self, values: Tensor, dims: tuple[int, ...] = (), *, out: Tensor | None = None
    ) -> Tensor:
        """Sums of `values [b, ...]` over `dims` and the samples of each group, `[m, ...]`.

        Args:
            values: `[b, ...]`.
            dims: Further dimensions of `values` that are summed over; the first always is.
            out: The sums are written here, in its dtype, if it is given and has their shape.
        """
        kept = [size for dim, size in enumerate(values.shape) if dim not in dims][1:]
        shape = torch.Size([len(self), *kept])
        total = out if out is not None and out.shape == shape else values.new_empty(shape)
        if self._even:
            even = self._evenly(values)
            torch.sum(even, (1, *(dim + 1 for dim in dims)), dtype=total.dtype, out=total)
        else:
            total.zero_()
        for group, rest in self._rests:
            total[group].add_(values[rest].sum((0, *dims), dtype=total.dtype))
        return total

    def products(self, left: Tensor, right: Tensor, *, out: Tensor | None) -> Tensor:
        """`P[g] = sum_s left[s]^T right[s]` over the samples s of group g, `[m, o, i]`.

        Args:
            left: `[b, n, o]`.
            right: `[b, n, i]`.
            out: `[m, o, i]`; the products are written here if it is given.
        """
        if self._even:
            a, b = self._evenly(left).flatten(1, 2), self._evenly(right).flatten(1, 2)
            out = torch.bmm(a.mT, b, out=out)
        elif out is None:
            out = left.new_empty(len(self), left.shape[2], right.shape[2])
        for group, rest in self._rests:
            a, b = left[rest].flatten(0, 1).T, right[rest].flatten(0, 1)
            if self._even:
                out[group].addmm_(a, b)
            else:
                torch.mm(a, b, out=out[group])
        # Nothing has written to the block of an empty group, which may be reused memory.
        if not self._even:
            for group in (group for group, size in enumerate(self.sizes) if not size):
                out[group].zero_()
        return out
