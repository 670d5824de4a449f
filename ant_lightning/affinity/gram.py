"""Dot products of all gradient rows, a slice of columns at a time, over the rows of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from ant_lightning.affinity.rows import RowStore

__all__ = ["BYTES_PER_NUMBER", "Shard", "half_dot_products"]

BYTES_PER_NUMBER = 24  # of a slice: as kept, gathered, reordered (4 each), and in float64 (8)


class Shard:
    """Which timesteps this process computes: every `world_size`-th, from its rank on.

    Args:
        sharded: Share the timesteps among the ranks of `torch.distributed`, if it is initialised;
            otherwise this process computes them all.
    """

    def __init__(self, *, sharded: bool = True) -> None:
        active = sharded and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        self.world_size = dist.get_world_size() if active else 1
        nccl = active and dist.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"

    def own(self, timesteps: Sequence[int]) -> list[int]:
        """This process's part of the timesteps."""
        return list(timesteps[self.rank :: self.world_size])

    def largest(self, value: int) -> int:
        """The largest of one integer of each rank."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, block: Tensor, *, num_points: int) -> Tensor:
        """Blocks `[n_rank, 2, c]` of all ranks as one `[n, 2, c]`, in the order of the grid."""
        if self.world_size == 1:
            return block
        most = -(-num_points // self.world_size)
        # float32, as not every back end gathers bfloat16; ranks with fewer timesteps are padded.
        mine = torch.zeros(most, *block.shape[1:], dtype=torch.float32, device=self._device)
        mine[: len(block)] = block.to(self._device)
        parts = torch.empty(self.world_size * most, *block.shape[1:], device=self._device)
        # torch 2.15 renamed it and warns of the old name.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(parts, mine)
        # Timestep i is entry i // world_size of rank i % world_size.
        by_rank = parts.view(self.world_size, most, *block.shape[1:])
        return by_rank.transpose(0, 1).flatten(0, 1)[:num_points]


def half_dot_products(
    rows: RowStore,
    timesteps: Sequence[int],
    *,
    shard: Shard,
    device: torch.device | str,
    work_bytes: int,
) -> Float[Tensor, "2 2 n n"]:
    """`result[g, h, i, j] = X_i · Y_j`, X of half g, Y of half h, summed in float64.

    Every number is read once and the sum over columns is made slice by slice, so that working
    memory does not grow with the number of parameters.

    Args:
        rows: The pairs of this rank's timesteps.
        timesteps: The whole grid, `n` timesteps.
        shard: Which of them this rank has.
        device: Where products are made.
        work_bytes: Memory of a slice.

    Returns:
        Float64 `[2, 2, n, n]` on the CPU, the same on every rank.
    """
    n = len(timesteps)
    own = shard.own(timesteps)
    # Apple's GPUs have no float64.
    device = "cpu" if torch.device(device).type == "mps" else device
    columns = max(1, min(rows.width, work_bytes // (2 * n * BYTES_PER_NUMBER)))
    gram = torch.zeros(2 * n, 2 * n, dtype=torch.float64, device=device)
    for start in range(0, rows.width, columns):
        block = rows.columns(own, start, min(start + columns, rows.width))
        block = shard.gather(block, num_points=n).to(device)
        halves = block.transpose(0, 1).reshape(2 * n, -1).double()
        gram.addmm_(halves, halves.T)
    gram = (gram + gram.T) / 2
    return gram.view(2, n, 2, n).transpose(1, 2).contiguous().cpu()
