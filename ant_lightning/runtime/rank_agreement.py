"""What must be equal on every rank of a run, and what happens when it is not."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ant_lightning.balancing.shards import is_sharded
from ant_lightning.errors import DivergedRanksError
from ant_lightning.runtime.rank_watch import several_ranks

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["check_ranks_agree"]


def check_ranks_agree(
    backbone: nn.Module, balancer: nn.Module | None, counts: list[int], *, device: torch.device
) -> None:
    """Compare weights, balancer and counts of all ranks bit by bit; a no-op on one process.

    Every rank must call this together, and all raise together. Three numbers of each rank cross
    the network; an accelerator is waited for once.

    Args:
        backbone: The network; sharded parameters are skipped.
        balancer: Compared with its whole state; `None` for none.
        counts: The step, and what else must be equal.
        device: Where tensors are exchanged.

    Raises:
        DivergedRanksError: Naming what differs and on which ranks.
    """
    if not several_ranks():
        return
    ours = {
        "weights of the backbone": _digest([_bit_sums(_tensors(backbone))]),
        "state of the balancer": _digest([] if balancer is None else _tensors(balancer)),
        "number of steps or boundaries of clusters": _digest([torch.tensor(counts)]),
    }
    mine = torch.tensor(list(ours.values()), device=device)
    every = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    for name, column in zip(ours, torch.stack(every).cpu().unbind(1), strict=True):
        # The value of most ranks is taken to be right: look at the others first.
        others = torch.nonzero(column != column.mode().values).flatten().tolist()
        if others:
            raise DivergedRanksError(
                f"{name}: must be the same on all {len(column)} ranks, found another on ranks "
                f"{others} at step {counts[0]}; no checkpoint was written"
            )


def _tensors(module: nn.Module) -> list[Tensor]:
    """Every tensor of the state that a rank has whole, the extra state included."""
    values = module.state_dict().values()
    return [v for v in values if isinstance(v, torch.Tensor) and not is_sharded([v])]


def _bit_sums(tensors: list[Tensor]) -> Tensor:
    """Sum of the bit patterns of each tensor modulo 2^64, `[n]`, on its device.

    Integers: no rounding hides a difference, and only one number per tensor leaves the device.
    """
    sums = [_bits(tensor).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums) if sums else torch.zeros(1, dtype=torch.int64)


def _digest(tensors: list[Tensor]) -> int:
    """A 63-bit hash of every byte, computed on the host."""
    hashed = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        hashed.update(_bits(tensor).cpu().numpy().tobytes())
    return int.from_bytes(hashed.digest(), "little") >> 1


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers, flat."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().flatten().view(integers[tensor.element_size()])
