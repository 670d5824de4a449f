"""Checks of the trainer, the data and the layers of a network before a run starts."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ant_lightning.balancing.base import Balancer
from ant_lightning.data.module import image_data
from ant_lightning.errors import ConfigError
from ant_lightning.models.backbone import backbone_name
from ant_lightning.runtime.sharded_strategy import ShardedStrategy

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.strategies import Strategy
    from torch import Tensor

    from ant_lightning.tasks.clusterings import Clustering

__all__ = [
    "check_batch_norm",
    "check_strategy",
    "check_trainer",
    "warn_of_other_model",
    "warn_of_rare_tasks",
]


def warn_of_other_model(clustering: Clustering, backbone: nn.Module) -> None:
    """Warn of clusters that come from the gradients of another kind of network.

    Only a warning, because it may be intended. The affinity of a small network for a large one of
    the same class does not warn.
    """
    measured, ours = clustering.measured_model(), backbone_name(backbone)
    if measured and measured.partition(",")[0] != ours:
        warnings.warn(
            f"tasks.clustering: its affinity was measured on {measured!r}, and the backbone is a "
            f"{ours}: the clusters are those of another network",
            stacklevel=3,
        )


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


def check_batch_norm(
    backbone: nn.Module, balancer: Balancer | None, *, engine: str, parts: int
) -> None:
    """Refuse batch norm where it would mix tasks; warn where it sees only a part of the batch.

    Raises:
        ConfigError: If the engine computes all task gradients in one pass.
    """
    named = backbone.named_modules()
    found = [(n, m) for n, m in named if isinstance(m, _BatchNorm) and m.training]
    by_task = balancer is not None and balancer.needs_gramian
    if not found or not (by_task or parts > 1):
        return
    layer = f"{type(found[0][1]).__name__} {found[0][0]!r} ({len(found)} such layers in all)"
    if by_task and engine not in {"auto", "loop"}:
        raise ConfigError(
            "tasks.engine: must be 'auto' or 'loop' with a gradient balancer and batch norm, which "
            f"mixes the samples of tasks in a pass, found {engine!r} and {layer}"
        )
    warnings.warn(
        "backbone: batch norm normalises each task (of a gradient balancer) and each part of "
        "accumulate_grad_batches alone in training, but all samples by one average of their "
        f"statistics in evaluation; group or layer norm has no such gap; found {layer}",
        stacklevel=4,
    )


def warn_of_rare_tasks(masses: Tensor, num_images: int, allocation: str | None) -> None:
    """Warn of tasks that are missing from some batches.

    Args:
        masses: Share of the draws that each cluster has, `[k]`.
        num_images: Images of a step, on all ranks together.
        allocation: See `TimestepSampling`; `None` for draws that ignore the tasks.
    """
    k = len(masses)
    expected = [num_images / k] * k if allocation == "equal" else (num_images * masses).tolist()
    rare = [
        f"task {task} (mass {mass:.2g}, {count:.2g} a step)"
        for task, (mass, count) in enumerate(zip(masses.tolist(), expected, strict=True))
        if count < 1 - 1e-9
    ]
    if rare:
        rank_zero_warn(
            f"tasks: the expected number of images of a task should be at least 1 a step, found "
            f"less for {', '.join(rare)} in batches of {num_images}: such a task is missing from "
            "some steps; use larger batches, timesteps.allocation equal, or weighted clusters"
        )
