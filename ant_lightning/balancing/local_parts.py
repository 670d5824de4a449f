"""Local parts of parameters that FSDP2 shards over ranks, and sharded tensors made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether at least one tensor is a `DTensor`."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - absent without distributed

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, detached; the whole of an ordinary tensor."""
    if not is_sharded([tensor]):
        return tensor.detach()
    # The local tensor is detached and not the sharded one: that takes a quarter of the time, and a
    # step does this for each parameter in each of its passes.
    with torch.no_grad():
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local.detach()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; collective if it is sharded."""
    tensor = tensor.detach()
    full: Tensor = tensor.full_tensor() if is_sharded([tensor]) else tensor  # type: ignore[attr-defined]
    return full


@torch.no_grad()
def from_local(local: Tensor, like: Tensor) -> Tensor:
    """A tensor sharded like `like` with this rank's part `local`; `local` if `like` is whole."""
    if not is_sharded([like]):
        return local
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    # Shape and stride are given because the parts may have different sizes: by default, torch
    # multiplies the local size by the number of ranks. `run_check` would communicate.
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def from_full(full: Tensor, like: Tensor) -> Tensor:
    """A tensor sharded like `like`, cut from the whole tensor on every rank."""
    if not is_sharded([like]) or is_sharded([full]):
        return full
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    # `src_data_rank=None`: each rank cuts its own copy, without a broadcast from rank 0.
    return distribute_tensor(full, mesh, placements, src_data_rank=None)
