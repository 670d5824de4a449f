"""Sums over the samples of each group of a batch."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Groups"]


class Groups:
    """A batch that is sorted by group: group i has the samples `starts[i] .. starts[i + 1] - 1`.

    Groups of one size are summed in one call, others in one call each.
    """

    def __init__(self, starts: Sequence[int]) -> None:
        self.sizes = [stop - start for start, stop in pairwise(starts)]
        self._size = self.sizes[0] if len(set(self.sizes)) == 1 else None

    def __len__(self) -> int:
        return len(self.sizes)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """The samples of each group."""
        return torch.split(values, self.sizes)

    def of_samples(self, device: torch.device) -> Tensor:
        """The group of each sample, `[b]`."""
        sizes = torch.tensor(self.sizes)
        return torch.arange(len(sizes)).repeat_interleave(sizes).to(device, non_blocking=True)

    def sums(self, values: Tensor) -> Tensor:
        """Sums of `values [b, ...]` over the samples of each group, `[m, ...]`."""
        if self._size is not None:
            return torch.unflatten(values, 0, (len(self), self._size)).sum(1)
        return torch.stack([part.sum(0) for part in self.split(values)])

    def products(self, left: Tensor, right: Tensor, *, out: Tensor | None) -> Tensor:
        """`P[g] = sum_s left[s]^T right[s]` over the samples s of group g, `[m, o, i]`.

        Args:
            left: `[b, n, o]`.
            right: `[b, n, i]`.
            out: `[m, o, i]`, written to if given.
        """
        if self._size is not None:
            rows = (len(self), self._size * left.shape[1])
            left = left.reshape(*rows, left.shape[2])
            right = right.reshape(*rows, right.shape[2])
            return torch.bmm(left.mT, right, out=out)
        if out is None:
            out = left.new_empty(len(self), left.shape[2], right.shape[2])
        for one, a, b in zip(out, self.split(left), self.split(right), strict=True):
            torch.mm(a.flatten(0, 1).T, b.flatten(0, 1), out=one)
        return out
