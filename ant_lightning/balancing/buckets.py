"""Buckets: parameters whose gradients travel together, in the order in which they arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ant_lightning.balancing.parameters import is_dense
from ant_lightning.balancing.reduction import padded_length

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from torch import Tensor

    from ant_lightning.balancing.reduction import Reduction


class Bucket(NamedTuple):
    """Parameters that share one vector.

    Attributes:
        members: Indices of the parameters, in the order of their numbers in the vector.
        length: Numbers in the vector, a multiple of the number of ranks.
        filled: Those of them that belong to a parameter; the others stay zero.
    """

    members: tuple[int, ...]
    length: int
    filled: int


class ArrivalOrder:
    """The order in which the parameters' gradients arrive, equal on all ranks.

    In the first step it is the parameters' order backwards. The next call of `agree` makes it the
    order of arrival that rank 0 has seen. Which numbers share a bucket decides how sums are
    rounded, so a resumed run goes on with the order that the run before it had.

    Args:
        num: Number of parameters.
        reduction: How ranks agree.
        known: `known()` of an earlier run, the same on all ranks; not used if it does not fit.
    """

    def __init__(self, num: int, reduction: Reduction, known: Sequence[int] = ()) -> None:
        self._agreed = sorted(known) == [*range(num)]
        self.indices = [*known] if self._agreed else [*reversed(range(num))]
        self._reduction = reduction
        self._seen: dict[int, None] = {}  # a set that keeps the order
        self._begun = False

    def known(self) -> list[int]:
        """The order of the next step, if some step has shown it; on rank 0."""
        if self._reduction.world_size == 1 or not (self._agreed or self._begun):
            return []
        return [*self._seen, *(index for index in self.indices if index not in self._seen)]

    def begin(self) -> None:
        """Begin a backward pass in which gradients arrive; all ranks call this together."""
        self._begun = True

    def arrived(self, index: int) -> None:
        """The gradient of a parameter has arrived."""
        if not self._agreed:
            self._seen[index] = None

    def agree(self, device: torch.device) -> bool:
        """Use the order that rank 0 has seen, if a step was; return whether this is new.

        All ranks call this together.
        """
        if self._agreed or not self._begun or self._reduction.world_size == 1:
            return False
        self._agreed = True
        order = torch.tensor(self.known(), device=device) * (self._reduction.rank == 0)
        self.indices = self._reduction.all_reduce_(order).tolist()
        self._seen = {}
        return True


def arranged(
    sizes: Sequence[int],
    order: Iterable[int],
    *,
    capacity: int,
    first: int,
    alone: int | None = None,
    separate: Container[int] = (),
    ranks: int = 1,
) -> list[Bucket]:
    """Parameters in buckets, in the order in which these will be full.

    Args:
        sizes: Numbers of each parameter.
        order: Indices of the parameters, in the order in which their gradients arrive.
        capacity: A bucket with this many numbers takes no more parameters.
        first: The same for the first bucket, which is small, so that sending begins early.
        alone: Parameters of this size have a bucket of their own; by default none has.
        separate: Indices of others that have a bucket of their own.
        ranks: Each length is a multiple of this.

    Examples:
        >>> from ant_lightning.balancing.buckets import arranged
        >>> for bucket in arranged([3, 5, 1, 9], [3, 2, 1, 0], capacity=5, first=5, ranks=2):
        ...     print(bucket)
        Bucket(members=(3,), length=10, filled=9)
        Bucket(members=(2, 1), length=6, filled=6)
        Bucket(members=(0,), length=4, filled=3)
    """
    found: list[Bucket] = []
    members: list[int] = []
    filled = 0

    def close(indices: Sequence[int]) -> None:
        numbers = sum(sizes[index] for index in indices)
        found.append(Bucket(tuple(indices), padded_length(numbers, ranks), numbers))

    for index in order:
        if index in separate or (alone is not None and sizes[index] >= alone):
            close([index])
            continue
        members.append(index)
        filled += sizes[index]
        if filled >= (capacity if found else first):
            close(members)
            members, filled = [], 0
    if members:
        close(members)
    return found


def memory_strides(p: Tensor) -> tuple[int, ...]:
    """Strides that autograd gives the gradient of `p`: those of `p`, row-major if not dense."""
    # With equal strides (channels-last, transposed), copies and the optimizer run over contiguous
    # memory.
    if is_dense(p):
        return p.stride()
    return torch.empty(p.shape, device="meta").stride()


def views_of(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """`flat` cut into tensors of the parameters' shapes and memory layouts."""
    return [view[0] for view in blocks_of(flat[None], parameters)]


def blocks_of(rows: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """`rows [k, p]` cut into a tensor `[k, *shape]` for each parameter, in its memory layout."""
    blocks, start, (num, step) = [], rows.storage_offset(), (len(rows), rows.stride(0))
    for p in parameters:
        blocks.append(rows.as_strided((num, *p.shape), (step, *memory_strides(p)), start))
        start += p.numel()
    return blocks
