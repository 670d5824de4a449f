"""FSDP2: shards a backbone over the ranks, and lets them call it different numbers of times."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ant_lightning.errors import ConfigError
from ant_lightning.runtime.sharded_strategy import ShardedStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning as L

_log = logging.getLogger(__name__)


def shard_backbone(backbone: nn.Module, trainer: L.Trainer) -> None:
    """Shard the backbone's parameters under `ShardedStrategy`; a no-op under any other.

    Each entry of a `ModuleList`, of the outermost ones in the network, is a unit that is gathered
    when it is called and freed afterwards. The rest of the backbone is one more unit. The balancer
    stays whole on every rank.

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
    # FSDP2 keeps what it makes in its first pass, and training cannot write to a tensor that was
    # made in inference mode.
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False
    from torch.distributed.fsdp import FSDPModule, fully_shard  # noqa: PLC0415 - a second

    if isinstance(backbone, FSDPModule):  # Lightning calls `configure_model` in every run
        return
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            "trainer.strategy: FSDP2 with parameters that not every rank uses needs torch >= 2.14, "
            f"found {torch.__version__}"
        )
    mesh = strategy.shard_mesh
    # Blocks first: the backbone then takes only the parameters that no block has. Freed after each
    # pass, the last unit too, so that between passes the modules hold shards: those that `EMA`
    # exchanges.
    for unit in [*_blocks(backbone), backbone]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    # Otherwise a parameter that only some ranks use makes the sum over ranks wrong, silently.
    for unit in _units(backbone):
        unit.set_reduce_scatter_unused_params(True)
    if trainer.is_global_zero:
        shape = " x ".join(map(str, mesh.shape))
        _log.warning("FSDP2: parameters are sharded over %s ranks", shape)


def refuse_shards(trainer: L.Trainer, callback: L.Callback) -> None:
    """Refuse a callback that needs the whole backbone on each rank.

    Raises:
        ConfigError: Under `ShardedStrategy`.
    """
    if isinstance(trainer.strategy, ShardedStrategy):
        raise ConfigError(
            f"trainer.strategy: must not shard the backbone for {type(callback).__name__}, which "
            "can measure a checkpoint of this run later, found ShardedStrategy"
        )


def reshard(backbone: nn.Module) -> None:
    """Free what a pass that failed has gathered; without communication."""
    for unit in _units(backbone):
        unit.reshard()


class UnevenCalls:
    """Lets ranks call a sharded backbone different numbers of times; does nothing to a whole one.

    Every pass through a sharded backbone is collective. Between `begin` and `finish`, a rank adds 1
    to a sum over the ranks of its replica before each pass. A rank that has come to `finish` adds 0
    and makes a padding pass, until nobody adds 1. So all ranks make the same number of passes,
    whatever each of them computes, and none gathers more than one unit at a time.

    All ranks must begin and finish. Between the two they may call the backbone, without gradients,
    and use no other collective.

    Args:
        backbone: The network.
        padding: Makes one pass through the backbone; its result is dropped.
    """

    def __init__(self, backbone: nn.Module, padding: Callable[[], object]) -> None:
        self._backbone = backbone
        self._padding = padding
        self._depth = 0
        self._hook: Any = None

    @property
    def begun(self) -> bool:
        """Whether more has begun than finished."""
        return self._depth > 0

    def begin(self) -> None:
        """From now on ranks may differ; nested calls only count."""
        self._depth += 1
        if self._depth == 1 and _units(self._backbone):
            self._hook = self._backbone.register_forward_pre_hook(self._announce, prepend=True)

    def finish(self) -> None:
        """Make padding passes until every rank has come here."""
        self._depth -= 1
        if self._depth == 0 and self._hook is not None:
            self.cancel()
            with torch.no_grad():
                while bool(self._sum(0)):
                    self._padding()

    def finish_after(self, trainer: L.Trainer | None, batch_idx: int) -> None:
        """Finish what was begun in a loop of the trainer if this is the rank's last batch.

        Not in `on_validation_epoch_end`, which callbacks have first: their collectives must not
        meet the passes of ranks that have batches left.
        """
        if trainer is None or not self.begun:  # a step outside a trainer's loop
            return
        if trainer.sanity_checking:
            counts = trainer.num_sanity_val_batches
        elif trainer.testing:
            counts = trainer.num_test_batches
        else:
            counts = trainer.num_predict_batches if trainer.predicting else trainer.num_val_batches
        if batch_idx + 1 == counts[0]:
            self.finish()

    def cancel(self) -> None:
        """Begin or finish no more: this rank has failed, or another run starts."""
        self._depth = 0
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """`begin`, and `finish` unless an error ends the context."""
        self.begin()
        try:
            yield
        except BaseException:
            self.cancel()
            raise
        self.finish()

    def _announce(self, *_: object) -> None:
        self._sum(1)  # not read: with this 1 it cannot be 0, so the host waits for nothing

    def _sum(self, value: int) -> Tensor:
        parameter: Any = next(self._backbone.parameters())
        mesh = parameter.device_mesh
        number = torch.tensor(value, device=parameter.device)
        dist.all_reduce(number, group=mesh.get_group(mesh.ndim - 1))
        return number


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (each for each in child if any(True for _ in each.parameters()))
        else:
            yield from _blocks(child)


def _units(backbone: nn.Module) -> list[Any]:
    """The units that `shard_backbone` made, the backbone included; none without sharding."""
    if not hasattr(backbone, "unshard"):
        return []
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415

    return [each for each in backbone.modules() if isinstance(each, FSDPModule)]
