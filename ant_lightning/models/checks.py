"""Checks of the trainer and the data before a run starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn

from ant_lightning.balancing.base import Balancer
from ant_lightning.data.module import image_data
from ant_lightning.errors import ConfigError
from ant_lightning.runtime.sharded_strategy import ShardedStrategy

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.strategies import Strategy

    from ant_lightning.models.settings import Tasks


def check_strategy(strategy: Strategy) -> None:
    """Check that gradients can be taken and reduced the way the training step does it.

    Raises:
        ConfigError: For a strategy that shards or wraps the model, or whose settings would be
            ignored because its own reduction never runs.
    """
    # DeepSpeed and XLA are subclasses of `DDPStrategy`, but reduce gradients in their own way.
    works = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ShardedStrategy))
    if not works or isinstance(strategy, (DeepSpeedStrategy, XLAStrategy)):
        raise ConfigError(
            "trainer.strategy: must be 'auto', 'ddp', 'fsdp2', 'hsdp' or an "
            "ant_lightning.ShardedStrategy, because the training step sums gradients itself, "
            f"found {type(strategy).__name__}"
        )
    # Settings of DDP's own reduction, which never runs.
    for name in ("ddp_comm_hook", "model_averaging_period"):
        value = getattr(strategy, f"_{name}", None)
        if value is not None:
            raise ConfigError(
                f"trainer.strategy.{name}: must be None, because the training step sums gradients "
                f"and not DDP, found {value}"
            )


def check_trainer_flags(trainer: L.Trainer) -> None:
    """Refuse flags of the Trainer that manual optimization has no use for.

    Lightning's own error would advise automatic optimization.

    Raises:
        ConfigError: Naming our setting for the same.
    """
    for name, ours, neutral in (
        ("gradient_clip_val", "clip_grad_norm", (None, 0)),
        ("accumulate_grad_batches", "accumulate_grad_batches", (1,)),
    ):
        value = getattr(trainer, name)
        if value not in neutral:
            raise ConfigError(
                f"trainer.{name}: must be left out; use "
                f"optimization=Optimization({ours}={value}) of the module, found {value}"
            )


def check_trainer(
    trainer: L.Trainer, *, backbone: nn.Module, balancer: Balancer | None, parts: int
) -> None:
    """Check the data and the Trainer's flags against the module.

    Args:
        trainer: The trainer, with its data.
        backbone: The network.
        balancer: Weights the tasks; `None` for vanilla training.
        parts: `accumulate_grad_batches`.

    Raises:
        ConfigError: Naming the setting, the rule and the value found.
    """
    by_gradient = balancer is not None and balancer.needs_gramian
    if by_gradient and any(isinstance(m, nn.SyncBatchNorm) for m in backbone.modules()):
        raise ConfigError(
            "trainer.sync_batchnorm: must be false with a gradient balancer, because ranks run the "
            "network a different number of times and would wait forever, found true"
        )
    data = image_data(trainer)
    if data is None:
        return
    batch_size = data.batch_size  # of all ranks together
    # Otherwise every step would lack the gradient of some task.
    if balancer is not None and balancer.needs_gramian and batch_size < balancer.num_tasks:
        raise ConfigError(
            f"data.batch_size: must be at least the {balancer.num_tasks} tasks of a gradient "
            f"balancer, found {batch_size}"
        )
    # Absent if the interval is a time.
    interval = getattr(trainer, "val_check_interval", None)
    batches = len(data.train_images) // batch_size
    by_epoch = trainer.check_val_every_n_epoch is not None
    if by_epoch and isinstance(interval, int) and interval > max(1, batches):
        raise ConfigError(
            f"trainer.val_check_interval: must be at most the {batches} batches of an epoch (or "
            f"check_val_every_n_epoch be None, to count the batches of the run), found {interval}"
        )
    if parts * trainer.world_size > batch_size:
        raise ConfigError(
            "optimization.accumulate_grad_batches: must be at most the "
            f"{batch_size // trainer.world_size} images of a rank, found {parts}"
        )


def check_sharding(strategy: Strategy, tasks: Tasks) -> None:
    """Check that a strategy that shards the backbone can compute the task gradients.

    Raises:
        ConfigError: Under `ShardedStrategy`, for another placement or engine.
    """
    if not isinstance(strategy, ShardedStrategy):
        return
    if tasks.placement == "sorted":
        raise ConfigError(
            "tasks.placement: must be 'spread' under FSDP2, which sums gradients itself, "
            "found 'sorted'"
        )
    if tasks.engine not in {"auto", "loop"}:
        raise ConfigError(
            "tasks.engine: must be 'auto' or 'loop' under FSDP2, where no rank has whole "
            f"parameters, found {tasks.engine!r}"
        )
