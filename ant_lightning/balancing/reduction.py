"""Sums over the samples of all ranks: no-ops on one process, collectives on several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["GroupReduction", "Reduction", "default_reduction"]


def _nothing() -> None:
    """Return at once: there is nothing to wait for."""


class Reduction:
    """Sums over ranks; this base class is the case of one process.

    A vector of `p` numbers is padded and cut into `world_size` equal shards, of which each rank
    keeps one. `reduce_scatter` moves half the bytes of an all-reduce, and is enough: ranks make dot
    products and linear combinations of their shards alone.
    """

    world_size: int = 1
    rank: int = 0

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over ranks, in place, and return it."""
        return tensor

    def reduce_scatter(self, shard: Tensor, full: Tensor) -> Callable[[], None]:
        """Start to write this rank's shard of the sum of `full` over ranks into `shard`.

        Args:
            shard: `[p / world_size]`, the output. On one process it may be `full` itself.
            full: `[p]`; it must not change before the wait.

        Returns:
            A function that waits until `shard` is written.
        """
        if shard.data_ptr() != full.data_ptr():
            shard.copy_(full)
        return _nothing

    def all_gather(self, full: Tensor, shard: Tensor) -> None:
        """Write the shards of all ranks, in order of rank, into `full`."""
        if shard.data_ptr() != full.data_ptr():
            full.copy_(shard)

    def all_to_all(self, received: Tensor, sent: Tensor, num_rows: list[int]) -> None:
        """Send the same number of rows to every rank, and receive the rows of every rank.

        Args:
            received: `[sum of num_rows, s]`, the output: the rows of rank 0, then those of rank 1
                and so on.
            sent: `[N num_rows[rank], s]`: the rows for rank 0, then those for rank 1 and so on.
            num_rows: Number of rows that each rank sends to each of the `N` ranks, itself included.
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
        """Replace `tensor` by its sum over ranks, in place, and return it."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def reduce_scatter(self, shard: Tensor, full: Tensor) -> Callable[[], None]:
        """Start to write this rank's shard of the sum of `full` over ranks into `shard`."""
        work = self._reduce_scatter(shard, full, group=self.group, async_op=True)
        if work is None:  # torch returns no handle if this rank is not in the group
            return _nothing

        def wait() -> None:
            work.wait()

        return wait

    def all_gather(self, full: Tensor, shard: Tensor) -> None:
        """Write the shards of all ranks, in order of rank, into `full`."""
        self._all_gather(full, shard, group=self.group)

    def all_to_all(self, received: Tensor, sent: Tensor, num_rows: list[int]) -> None:
        """Send the same number of rows to every rank, and receive the rows of every rank."""
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
