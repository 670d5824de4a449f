"""Checks that all ranks of a run have the same weights, balancer state and counts."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ant_lightning.balancing.local_parts import is_sharded, local_part
from ant_lightning.errors import DivergedRanksError
from ant_lightning.runtime.rank_watch import several_ranks

if TYPE_CHECKING:
    from torch import Tensor, nn

_SHARDS = "shards of the backbone"


def check_ranks_agree(
    backbone: nn.Module, balancer: nn.Module | None, counts: list[int], *, device: torch.device
) -> None:
    """Compare weights, balancer and counts of all ranks bit by bit; a no-op on one process.

    Collective: every rank must call it, and if it raises, it raises on all of them. Each rank sends
    three numbers, and the host waits for the accelerator once.

    Args:
        backbone: The network. Sharded parameters are compared between replicas.
        balancer: Compared with its whole state; `None` for none.
        counts: The step, then any other numbers that must be equal.
        device: Device of the exchanged tensor, as the backend (NCCL, gloo) requires.

    Raises:
        DivergedRanksError: Naming what differs and on which ranks.
    """
    if not several_ranks():
        return
    # The backbone is large: sums on its device, then a hash of these. The balancer is hashed whole.
    sharded = [p for p in backbone.parameters() if is_sharded([p])]
    ours = {
        "weights of the backbone": _digest([_bit_sums(_tensors(backbone))]),
        "state of the balancer": _digest([] if balancer is None else _tensors(balancer)),
        "number of steps or boundaries of clusters": _digest([torch.tensor(counts)]),
        _SHARDS: _digest([_bit_sums([local_part(p) for p in sharded])]),
    }
    mine = torch.tensor(list(ours.values()), device=device)
    every = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    for name, column in zip(ours, torch.stack(every).cpu().unbind(1), strict=True):
        if name == _SHARDS:
            others = _parted(column, sharded)
        else:
            # Report the minority: the value of most ranks is probably the right one.
            others = torch.nonzero(column != column.mode().values).flatten().tolist()
        if others:
            raise DivergedRanksError(
                f"{name}: must be the same on all {len(column)} ranks"
                f"{' with the same part' if name == _SHARDS else ''}, found another on ranks "
                f"{others} at step {counts[0]}; no checkpoint was written"
            )


def _parted(digests: Tensor, sharded: list[nn.Parameter]) -> list[int]:
    """Ranks that hold the same parts as ranks of other replicas, with other values."""
    if not sharded or sharded[0].device_mesh.ndim == 1:  # type: ignore[attr-defined]
        return []
    ranks: Tensor = sharded[0].device_mesh.mesh  # type: ignore[attr-defined] # [replicas, shards]
    grid = digests[ranks]
    parted: list[int] = ranks[:, (grid != grid[0]).any(0)].flatten().tolist()
    return parted


def _tensors(module: nn.Module) -> list[Tensor]:
    """Every tensor of the state dict, extra state included, except shards, which differ."""
    values = module.state_dict().values()
    return [v for v in values if isinstance(v, torch.Tensor) and not is_sharded([v])]


def _bit_sums(tensors: list[Tensor]) -> Tensor:
    """Sum of the bit patterns of each tensor modulo 2^64, `[n]`, on its device.

    Sums of integers are exact in any order. Only one number per tensor leaves the device.
    """
    sums = [_bits(tensor).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums) if sums else torch.zeros(1, dtype=torch.int64)


def _digest(tensors: list[Tensor]) -> int:
    """A 63-bit hash of every byte, computed on the host."""
    hashed = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        hashed.update(_bits(tensor).cpu().numpy().tobytes())
    # One bit less than the hash: the number is exchanged as a signed int64.
    return int.from_bytes(hashed.digest(), "little") >> 1


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers, flat: unlike floats, equal NaNs compare equal."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().flatten().view(integers[tensor.element_size()])
