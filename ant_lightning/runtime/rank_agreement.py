"""What must be equal on every rank of a run, and what happens when it is not."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ant_lightning.balancing.shards import is_sharded
from ant_lightning.errors import DivergedRanksError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["check_ranks_agree"]


def check_ranks_agree(module: MultiTaskDiffusion) -> None:
    """Compare weights, balancer and counts of all ranks bit by bit; a no-op on one process.

    Every rank must call this together, and raises together. Three numbers for each rank cross the
    network; on an accelerator it waits once.

    Raises:
        DivergedRanksError: Naming what differs and on which ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    balancer = module.balancer
    counts = [module.global_step, module.num_skipped_steps, *module.clusters.boundaries]
    ours = {
        "weights of the backbone": _digest([_bit_sums(_tensors(module.backbone))]),
        "state of the balancer": _digest([] if balancer is None else _tensors(balancer)),
        "number of steps or boundaries of clusters": _digest([torch.tensor(counts)]),
    }
    mine = torch.tensor(list(ours.values()), device=module.device)
    every = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    table = torch.stack(every).cpu()
    for name, column in zip(ours, table.unbind(1), strict=True):
        # The majority is taken for right: that is where to look first.
        usual = column.mode().values
        if bool((column != usual).any()):
            ranks = torch.nonzero(column != usual).flatten().tolist()
            raise DivergedRanksError(
                f"{name}: must be the same on all {len(column)} ranks, found another on ranks "
                f"{ranks} at step {module.global_step}; no checkpoint was written"
            )


def _tensors(module: nn.Module) -> list[Tensor]:
    """Every tensor of the state that a rank has whole, the extra state included."""
    values = module.state_dict().values()
    return [v for v in values if isinstance(v, torch.Tensor) and not is_sharded([v])]


def _bit_sums(tensors: list[Tensor]) -> Tensor:
    """Sum of the bit patterns of each tensor modulo 2^64, `[n]`, taken where they are.

    Integers: no rounding hides a difference, and only one number a tensor leaves the device.
    """
    sums = [_bits(tensor).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums) if sums else torch.zeros(1, dtype=torch.int64)


def _digest(tensors: list[Tensor]) -> int:
    """A 63-bit hash of every byte, on the host."""
    hashed = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        hashed.update(_bits(tensor).cpu().numpy().tobytes())
    return int.from_bytes(hashed.digest(), "little") >> 1


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers, flat."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().flatten().view(integers[tensor.element_size()])
