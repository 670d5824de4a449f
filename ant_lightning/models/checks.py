"""Settings that contradict each other are refused before a run starts."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ant_lightning.balancing.base import GradientBalancer
from ant_lightning.data.module import image_data
from ant_lightning.errors import ConfigError
from ant_lightning.models.protocol import backbone_name
from ant_lightning.runtime.sharded_strategy import ShardedStrategy
from ant_lightning.tasks.clusterings import Clustering

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["check_settings", "check_strategy", "check_trainer", "warn_of_other_model"]


def check_settings(module: MultiTaskDiffusion) -> None:
    """Check the arguments of a module against each other.

    Raises:
        ConfigError: Naming the setting, the rule and the value found.
    """
    balancer, clusters = module.balancer, module.clusters
    by_gradient = isinstance(balancer, GradientBalancer)
    if balancer is not None and balancer.num_tasks != clusters.num_tasks:
        raise ConfigError(
            f"tasks.balancer.num_tasks: must equal the number of clusters {clusters.num_tasks}, "
            f"found {balancer.num_tasks}"
        )
    interval = module.timesteps.interval
    if interval is not None and balancer is not None:
        raise ConfigError(
            "timesteps.interval: a specialist has one task, so tasks.balancer must be None, found "
            f"{type(balancer).__name__}"
        )
    if interval is not None and interval[1] > clusters.num_timesteps:
        raise ConfigError(
            f"timesteps.interval: must end at {clusters.num_timesteps} or before, found "
            f"{list(interval)}"
        )
    if by_gradient and module.timesteps.method == "uniform":
        raise ConfigError(
            "timesteps.method: must be 'stratified', because a gradient balancer needs samples of "
            "every task in each batch, found 'uniform'"
        )
    parts = module.optimization.accumulate_grad_batches
    if parts > 1 and module.tasks.engine not in {"auto", "loop"}:
        raise ConfigError(
            f"tasks.engine: must be 'auto' or 'loop' with accumulate_grad_batches {parts}, because "
            f"it needs the images of a step in one pass, found {module.tasks.engine!r}"
        )
    _check_batch_norm(module)
    _check_sampling(module)
    needed = module.process.output_channels(module.image_shape[0])
    found = int(module.backbone.out_channels)  # type: ignore[arg-type]
    if found != needed:
        raise ConfigError(
            f"backbone.out_channels: variance_type {module.process.variance_type!r} needs "
            f"{needed}, found {found}"
        )


def warn_of_other_model(clustering: Clustering, backbone: nn.Module) -> None:
    """Warn of clusters that come from the gradients of another kind of network.

    It may be meant (the affinity of a small model for a large one of its kind never warns).
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
    works = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ShardedStrategy))
    if not works or isinstance(strategy, (DeepSpeedStrategy, XLAStrategy)):
        raise ConfigError(
            "trainer.strategy: task gradients are taken and summed by the training step, so it "
            "must be 'auto', 'ddp' or (experimental) ant_lightning.ShardedStrategy, "
            f"found {type(strategy).__name__}"
        )
    if isinstance(strategy, DDPStrategy):
        ignored = ("ddp_comm_hook", "model_averaging_period")
        for name in ignored:
            if getattr(strategy, f"_{name}", None) is not None:
                raise ConfigError(
                    f"trainer.strategy.{name}: gradients are reduced by the training step and not "
                    f"by DDP, so it must be None, found {getattr(strategy, f'_{name}')}"
                )


def check_trainer(module: MultiTaskDiffusion) -> None:
    """Check the data and the Trainer's flags against the module.

    Raises:
        ConfigError: Naming the setting, the rule and the value found.
    """
    trainer = module.trainer
    synchronised = any(isinstance(m, nn.SyncBatchNorm) for m in module.backbone.modules())
    by_gradient = isinstance(module.balancer, GradientBalancer)
    if synchronised and by_gradient:
        raise ConfigError(
            "trainer.sync_batchnorm: with a gradient balancer, ranks run the network a different "
            "number of times and would wait for each other forever, so it must be false, found true"
        )
    data = image_data(trainer)
    if data is None:
        return
    batch_size = data.batch_size
    if by_gradient and batch_size < module.num_tasks:
        raise ConfigError(
            f"data.batch_size: a gradient balancer needs at least one image for each of the "
            f"{module.num_tasks} tasks, found {batch_size}"
        )
    interval, batches = trainer.val_check_interval, len(data.train_images) // batch_size
    by_epoch = trainer.check_val_every_n_epoch is not None
    if by_epoch and isinstance(interval, int) and interval > max(1, batches):
        raise ConfigError(
            "trainer.val_check_interval: with check_val_every_n_epoch set it counts the batches "
            f"of an epoch, so at most {batches} (or set check_val_every_n_epoch to None to count "
            f"those of the run), found {interval}"
        )
    parts = module.optimization.accumulate_grad_batches
    if parts * trainer.world_size > batch_size:
        raise ConfigError(
            "optimization.accumulate_grad_batches: each part needs an image, so at most "
            f"{batch_size // trainer.world_size}, found {parts}"
        )


def _check_batch_norm(module: MultiTaskDiffusion) -> None:
    """Batch norm mixes samples of a pass: refuse engines with one pass, warn of several passes."""
    named = module.backbone.named_modules()
    found = [(n, m) for n, m in named if isinstance(m, _BatchNorm) and m.training]
    by_task = isinstance(module.balancer, GradientBalancer)
    if not found or not (by_task or module.optimization.accumulate_grad_batches > 1):
        return
    layer = f"{type(found[0][1]).__name__} {found[0][0]!r} ({len(found)} such layers in all)"
    if by_task and module.tasks.engine not in {"auto", "loop"}:
        raise ConfigError(
            "tasks.engine: batch norm mixes the samples of tasks, so with a gradient balancer it "
            f"must be 'auto' or 'loop', found {module.tasks.engine!r} and {layer}"
        )
    warnings.warn(
        "backbone: batch norm normalises each task (of a gradient balancer) and each part of "
        "accumulate_grad_batches alone in training, but all samples by one average of their "
        f"statistics in evaluation; group or layer norm has no such gap; found {layer}",
        stacklevel=4,
    )


def _check_sampling(module: MultiTaskDiffusion) -> None:
    """Check what sampling and guidance need of the backbone."""
    channels, guided = module.image_shape[0], module.sampling.guided_channels
    if guided is not None and not 1 <= guided <= channels:
        raise ConfigError(
            f"sampling.guided_channels: must be from 1 to the {channels} channels of an image, or "
            f"None for all, found {guided}"
        )
    if not 0 <= module.class_dropout < 1:
        raise ConfigError(
            f"class_dropout: must be at least 0 and below 1, found {module.class_dropout}"
        )
    if module.null_class is not None:
        return
    why = "the backbone has no null class (num_classes or class_dropout_prob is 0)"
    if module.class_dropout:
        raise ConfigError(f"class_dropout: must be 0 because {why}, found {module.class_dropout}")
    if module.guidance_scale != 1.0:
        raise ConfigError(
            f"sampling.guidance_scale: must be 1 because {why}, found {module.guidance_scale}"
        )
