"""What must be equal on every rank of a run, and what happens when it is not."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ant_lightning.errors import DivergedRanksError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from ant_lightning.modules.multitask import MultiTaskDiffusion

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
    counts = [module.global_step, module.num_skipped_steps]
    ours = {
        "weights of the backbone": _digest(_state(module.backbone)),
        "state of the balancer": _digest([] if balancer is None else _state(balancer)),
        "number of steps": _digest([torch.tensor(counts)]),
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
                f"{name}: must be the same on all {len(column)} ranks, found others on {ranks} at "
                f"step {module.global_step}; no checkpoint was written"
            )


def _state(module: nn.Module) -> list[Tensor]:
    """Every tensor of the state, the extra state included."""
    return [value for value in module.state_dict().values() if isinstance(value, torch.Tensor)]


def _digest(tensors: Iterable[Tensor]) -> int:
    """A 63-bit hash of sums of the tensors' bits, taken where they are."""
    sums = [_bit_sum(tensor.detach()) for tensor in tensors if tensor.numel()]
    if not sums:
        return 0
    host = torch.stack([s.to(sums[0].device) for s in sums]).cpu()
    digest = hashlib.blake2b(host.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _bit_sum(tensor: Tensor) -> Tensor:
    """Sum of the bit patterns as integers, modulo 2^64: no rounding hides a difference."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(views[tensor.element_size()]).sum(dtype=torch.int64)
