"""Sums over the samples of all ranks: no-ops on one process, collectives on several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["GroupReduction", "Reduction", "default_reduction"]


def _nothing() -> None:
    """Wait for nothing, as on one process."""


class Reduction:
    """Sums over ranks; this base class is the case of one process.

    A vector of `p` numbers is cut into `world_size` equal shards (`p` padded up), of which each
    rank keeps one: `reduce_scatter` then moves half the bytes of an all-reduce, and dot products
    and linear combinations need only the shard.
    """

    world_size: int = 1
    rank: int = 0

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over ranks; returns it."""
        return tensor

    def reduce_scatter(self, shard: Tensor, full: Tensor) -> Callable[[], None]:
        """Start to write this rank's shard of the sum of `full`; call the result to wait for it.

        Args:
            shard: `[p / world_size]`, written. On one process it is `full` itself.
            full: `[p]`, must not change before the wait.
        """
        if shard.data_ptr() != full.data_ptr():
            shard.copy_(full)
        return _nothing

    def all_gather(self, full: Tensor, shard: Tensor) -> None:
        """Write the shards of all ranks, in order of rank, into `full`."""
        if shard.data_ptr() != full.data_ptr():
            full.copy_(shard)

    def all_to_all(self, received: Tensor, sent: Tensor, num_rows: list[int]) -> None:
        """Send equally many rows to each rank, in order of rank, and receive theirs.

        Args:
            received: `[sum of num_rows, s]`, written: the rows of rank 0, then those of rank 1, ...
            sent: `[N num_rows[rank], s]`, the rows for rank 0, then those for rank 1, ...
            num_rows: How many rows each rank sends to each other.
        """
        received.copy_(sent)


class GroupReduction(Reduction):
    """Sums over the ranks of a process group, by `torch.distributed`."""

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

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over ranks; returns it."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def reduce_scatter(self, shard: Tensor, full: Tensor) -> Callable[[], None]:
        """Start to write this rank's shard of the sum of `full`; call the result to wait for it."""
        work = self._reduce_scatter(shard, full, group=self.group, async_op=True)
        if work is None:
            return _nothing

        def wait() -> None:
            work.wait()

        return wait

    def all_gather(self, full: Tensor, shard: Tensor) -> None:
        """Write the shards of all ranks, in order of rank, into `full`."""
        self._all_gather(full, shard, group=self.group)

    def all_to_all(self, received: Tensor, sent: Tensor, num_rows: list[int]) -> None:
        """Send equally many rows to each rank, in order of rank, and receive theirs."""
        outgoing = [num_rows[self.rank]] * self.world_size
        dist.all_to_all_single(received, sent, num_rows, outgoing, group=self.group)


def default_reduction() -> Reduction:
    """Over all ranks if `torch.distributed` was initialised with more than one, else local."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return GroupReduction()
    return Reduction()


def padded_length(length: int, world_size: int) -> int:
    """The smallest multiple of `world_size` that is at least `length`."""
    return -(-length // world_size) * world_size
