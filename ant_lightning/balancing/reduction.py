"""Sums over the samples of all ranks: no-ops on one process, collectives on several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor


def nothing() -> None:
    """Return at once: there is nothing to wait for."""


class Reduction:
    """Sums over ranks; this base class is the case of one process.

    A vector of `p` numbers is padded and cut into `world_size` equal shards, of which each rank
    keeps one. `reduce_scatter` moves half the bytes of an all-reduce, and is enough: ranks make dot
    products and linear combinations of their shards alone.

    What returns a function has only started: call that function to wait, and until then leave the
    tensors alone. All ranks start the same operations in the same order.
    """

    world_size: int = 1
    rank: int = 0

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over ranks, in place, and return it."""
        self.start_all_reduce_(tensor)()
        return tensor

    def start_all_reduce_(self, tensor: Tensor) -> Callable[[], None]:
        """Start to replace `tensor` by its sum over ranks; return the wait."""
        return nothing

    def reduce_scatter(
        self, shard: Tensor, full: Tensor | None, holders: Sequence[int] | None = None
    ) -> Callable[[], None]:
        """Start to write this rank's shard of the sum of `full` over ranks into `shard`.

        Args:
            shard: `[p / world_size]`, the output.
            full: `[p]`; `None` on a rank that is no holder.
            holders: Ranks that have something to add, ascending; by default all.

        Returns:
            A function that waits until `shard` is written.
        """
        if full is None:
            shard.zero_()
        elif shard.data_ptr() != full.data_ptr():
            shard.copy_(full)
        return nothing

    def all_gather_(self, full: Tensor) -> Callable[[], None]:
        """Start to fill `full [p]`, of which this rank has written its own shard; return the wait.

        The shards lie in order of rank.
        """
        return nothing

    def all_gather_parts_(self, parts: Sequence[Tensor]) -> Callable[[], None]:
        """Start to fill `parts`, one of each rank, of which this rank has written its own.

        They may have different lengths, and each rank knows all lengths.

        Returns:
            A function that waits until all parts are written.
        """
        return nothing


class GroupReduction(Reduction):
    """Sums over the ranks of a process group, by `torch.distributed`.

    Tensors on a CPU are sent from rank to rank. gloo's reduce-scatter is a copy and an all-reduce,
    which sends twice the bytes and takes three times as long; its all-gather makes two copies.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        # torch 2.14 gave these collectives new names and warns about the old ones.
        self._reduce_scatter: Callable[..., Any] = (
            getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        )
        self._all_gather: Callable[..., Any] = (
            getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        )

    def start_all_reduce_(self, tensor: Tensor) -> Callable[[], None]:
        """Start to replace `tensor` by its sum over ranks; return the wait."""
        return _wait_for(dist.all_reduce(tensor, group=self.group, async_op=True))

    def reduce_scatter(
        self, shard: Tensor, full: Tensor | None, holders: Sequence[int] | None = None
    ) -> Callable[[], None]:
        """Start to write this rank's shard of the sum of `full` over ranks into `shard`."""
        if holders is None and shard.device.type != "cpu":
            work = self._reduce_scatter(shard, full, group=self.group, async_op=True)
            return _wait_for(work)
        senders = [r for r in self._other_ranks() if holders is None or r in holders]
        # The first part to arrive is written where the sum is wanted.
        parts = [shard if i == 0 else torch.empty_like(shard) for i in range(len(senders))]
        operations = [
            self._operation(dist.irecv, *each) for each in zip(parts, senders, strict=True)
        ]
        own = None
        if full is not None:
            shards = full.view(self.world_size, -1)
            own = shards[self.rank]
            operations += [self._operation(dist.isend, shards[r], r) for r in self._other_ranks()]
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for work in works:
                work.wait()
            # The order of the terms depends on ranks alone, so that a run can be repeated.
            if own is not None and parts:
                shard.add_(own)
            elif own is not None:
                shard.copy_(own)
            elif not parts:
                shard.zero_()
            for part in parts[1:]:
                shard.add_(part)

        return wait

    def all_gather_(self, full: Tensor) -> Callable[[], None]:
        """Start to fill `full`, of which this rank has written its own shard; return the wait."""
        shards = full.view(self.world_size, -1)
        if full.device.type == "cpu":
            return self.all_gather_parts_(shards.unbind())
        work = self._all_gather(full, shards[self.rank], group=self.group, async_op=True)
        return _wait_for(work)

    def all_gather_parts_(self, parts: Sequence[Tensor]) -> Callable[[], None]:
        """Start to fill `parts`, of which this rank has written its own; return the wait."""
        own, others = parts[self.rank], [*self._other_ranks()]
        operations = [self._operation(dist.irecv, parts[r], r) for r in others if parts[r].numel()]
        if own.numel():
            operations += [self._operation(dist.isend, own, r) for r in others]
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def _other_ranks(self) -> Iterable[int]:
        """The other ranks, beginning with the next: not every rank sends to the same one first."""
        return ((self.rank + i) % self.world_size for i in range(1, self.world_size))

    def _operation(self, kind: Callable[..., Any], tensor: Tensor, peer: int) -> dist.P2POp:
        of_all = peer if self.group is None else dist.get_global_rank(self.group, peer)
        return dist.P2POp(kind, tensor, of_all, self.group)


def default_reduction() -> Reduction:
    """Over all ranks if `torch.distributed` was initialised with more than one, else local."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return GroupReduction()
    return Reduction()


def _wait_for(work: dist.Work | None) -> Callable[[], None]:
    """The wait of a collective; torch returns no handle if this rank is not in the group."""
    if work is None:
        return nothing

    def wait() -> None:
        work.wait()

    return wait


def padded_length(length: int, world_size: int) -> int:
    """The smallest multiple of `world_size` that is at least `length`."""
    return -(-length // world_size) * world_size
