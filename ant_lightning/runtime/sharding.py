"""FSDP2 (experimental): shards a backbone's parameters over the ranks, and gathers them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ant_lightning.errors import ConfigError
from ant_lightning.runtime.sharded_strategy import ShardedStrategy

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning as L

__all__ = ["gather_for_evaluation", "reshard", "shard_backbone"]

_log = logging.getLogger(__name__)


def shard_backbone(backbone: nn.Module, trainer: L.Trainer) -> None:
    """Shard the backbone's parameters under `ShardedStrategy`; a no-op under any other.

    Each entry of the backbone's `ModuleList`s is a unit that is gathered when it is called. The
    rest of the backbone is one more unit. The balancer stays whole on every rank.

    Raises:
        ConfigError: Naming the setting, the rule and the value found.
    """
    strategy, precision = trainer.strategy, trainer.precision  # type: ignore[attr-defined]
    if not isinstance(strategy, ShardedStrategy):
        return
    if precision not in {"32-true", "bf16-mixed"}:
        raise ConfigError(
            f"trainer.precision: must be 32-true or bf16-mixed under FSDP2, found {precision}"
        )
    from torch.distributed.fsdp import FSDPModule, fully_shard  # noqa: PLC0415 - a second

    if isinstance(backbone, FSDPModule):  # Lightning calls `configure_model` in every run
        return
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            "trainer.strategy: FSDP2 with parameters that not every rank uses needs torch >= 2.14, "
            f"found {torch.__version__}"
        )
    mesh = strategy.device_mesh["data_parallel"]
    # Blocks first: the backbone then takes only the parameters that no block has.
    for unit in [*_blocks(backbone), backbone]:
        fully_shard(unit, mesh=mesh)
    # Otherwise a parameter that only some ranks use makes the sum over ranks wrong, silently.
    for unit in _units(backbone):
        unit.set_reduce_scatter_unused_params(True)
    if trainer.is_global_zero:
        _log.warning("FSDP2 is experimental: parameters are sharded over %d ranks", mesh.size())


def gather_for_evaluation(backbone: nn.Module) -> None:
    """Gather the whole backbone on every rank for an evaluation.

    Gathering is collective, and ranks may have different numbers of batches: a rank that gathered
    in a forward pass of its own would wait forever.
    """
    # Lightning evaluates in inference mode. Tensors made in it cannot be written to in training.
    with torch.inference_mode(False):
        for unit in _units(backbone):
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()


def reshard(backbone: nn.Module) -> None:
    """Undo `gather_for_evaluation`."""
    for unit in _units(backbone):
        unit.reshard()
        # The defaults of `fully_shard`: only the root stays gathered after its forward pass.
        unit.set_reshard_after_forward(unit is not backbone, recurse=False)


def _blocks(backbone: nn.Module) -> Iterator[nn.Module]:
    for child in backbone.children():
        if isinstance(child, nn.ModuleList):
            yield from (each for each in child if any(True for _ in each.parameters()))


def _units(backbone: nn.Module) -> list[Any]:
    """The units that `shard_backbone` made, the backbone included; none without sharding."""
    if not hasattr(backbone, "unshard"):
        return []
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415

    return [each for each in backbone.modules() if isinstance(each, FSDPModule)]
