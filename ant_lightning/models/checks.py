"""Settings that contradict each other are refused before a run starts."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ant_lightning.balancing.base import GradientBalancer
from ant_lightning.data.of_trainer import image_data
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
    if balancer is not None and balancer.num_tasks != clusters.num_tasks:
        raise ConfigError(
            f"model.balancer.num_tasks: must equal the number of clusters {clusters.num_tasks}, "
            f"found {balancer.num_tasks}"
        )
    if isinstance(balancer, GradientBalancer) and module.timestep_sampling == "uniform":
        raise ConfigError(
            "model.timestep_sampling: a gradient balancer needs samples of every task in each "
            "batch, so it must be 'stratified', found 'uniform'"
        )
    if module.placement == "sorted" and not isinstance(balancer, GradientBalancer):
        raise ConfigError(
            "model.placement: 'sorted' saves traffic of gradient balancers alone, so without one "
            f"it must be 'spread', found {module.placement!r} with {type(balancer).__name__}"
        )
    _check_engine(module)
    _check_batch_norm(module)
    positive = {
        "accumulate_grad_batches": module.accumulate_grad_batches,
        "max_skipped_steps": module.max_skipped_steps,
    }
    for name, value in positive.items():
        if value < 1:
            raise ConfigError(f"model.{name}: must be at least 1, found {value}")
    if module.clip_grad_norm is not None and not module.clip_grad_norm > 0:
        raise ConfigError(
            "model.clip_grad_norm: must be above 0, or null for none, "
            f"found {module.clip_grad_norm}"
        )
    if module.warmup_steps < 0:
        raise ConfigError(f"model.warmup_steps: must be 0 or more, found {module.warmup_steps}")
    if module.warmup_steps and module.lr_scheduler is not None:
        raise ConfigError(
            "model.warmup_steps: must be 0 when model.lr_scheduler is set, "
            f"found {module.warmup_steps}"
        )
    channels = module.image_shape[0]
    if module.guided_channels is not None and not 1 <= module.guided_channels <= channels:
        raise ConfigError(
            f"model.guided_channels: must be from 1 to the {channels} channels of an image, or "
            f"null for all, found {module.guided_channels}"
        )
    _check_conditioning(module)
    _check_channels(module)
    if module.train_interval is not None:
        start, stop = module.train_interval
        if not 0 <= start < stop <= clusters.num_timesteps:
            raise ConfigError(
                f"model.train_interval: must satisfy 0 <= start < stop <= "
                f"{clusters.num_timesteps}, found [{start}, {stop}]"
            )
        if module.timestep_sampling != "uniform" or balancer is not None:
            raise ConfigError(
                "model.train_interval: a specialist has one task, so model.balancer must be null "
                f"and timesteps uniform, found {type(balancer).__name__} and "
                f"{module.timestep_sampling!r}"
            )


def warn_of_other_model(clustering: Clustering, backbone: nn.Module) -> None:
    """Warn of clusters that come from the gradients of another kind of network.

    It may be meant (the affinity of a small model for a large one of its kind never warns).
    """
    measured, ours = clustering.measured_model(), backbone_name(backbone)
    if measured and measured.partition(",")[0] != ours:
        warnings.warn(
            f"model.clustering: was measured of {measured!r}, and "
            f"model.backbone is a {ours}: the clusters are those of another network",
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
                    f"by DDP, so it must be null, found {getattr(strategy, f'_{name}')}"
                )


def check_trainer(module: MultiTaskDiffusion) -> None:
    """Check the data and the Trainer's flags against the module.

    Raises:
        ConfigError: Naming the setting, the rule and the value found.
    """
    trainer = module.trainer
    synchronised = any(isinstance(m, nn.SyncBatchNorm) for m in module.backbone.modules())
    if synchronised and isinstance(module.balancer, GradientBalancer):
        raise ConfigError(
            "trainer.sync_batchnorm: with a gradient balancer, ranks run the network a different "
            "number of times and would wait for each other forever, so it must be false, found true"
        )
    data = image_data(trainer)
    if data is None:
        return
    batch_size = data.batch_size
    if isinstance(module.balancer, GradientBalancer) and batch_size < module.num_tasks:
        raise ConfigError(
            f"data.batch_size: a gradient balancer needs at least one image for each of the "
            f"{module.num_tasks} tasks, found {batch_size}"
        )
    interval, batches = trainer.val_check_interval, len(data.train_images) // batch_size
    by_epoch = trainer.check_val_every_n_epoch is not None
    if by_epoch and isinstance(interval, int) and interval > max(1, batches):
        raise ConfigError(
            "trainer.val_check_interval: with check_val_every_n_epoch set it counts the batches "
            f"of an epoch, so at most {batches} (or set check_val_every_n_epoch to null to count "
            f"those of the run), found {interval}"
        )
    if module.accumulate_grad_batches * trainer.world_size > batch_size:
        raise ConfigError(
            f"model.accumulate_grad_batches: each part needs an image, so at most "
            f"{batch_size // trainer.world_size}, found {module.accumulate_grad_batches}"
        )


def _check_engine(module: MultiTaskDiffusion) -> None:
    whole = {"one_pass", "vmap", "low_memory"}
    if module.engine in whole and module.accumulate_grad_batches > 1:
        raise ConfigError(
            f"model.engine: {module.engine!r} needs the images of a step in one pass, so with "
            f"accumulate_grad_batches {module.accumulate_grad_batches} it must be 'auto' or "
            f"'loop', found {module.engine!r}"
        )
    if module.engine == "low_memory" and module.placement == "sorted":
        raise ConfigError(
            "model.placement: 'sorted' sends rows of task gradients, of which engine 'low_memory' "
            f"has none, so it must be 'spread', found {module.placement!r}"
        )


def _check_batch_norm(module: MultiTaskDiffusion) -> None:
    """Batch norm mixes samples of a pass: refuse engines with one pass, warn of several passes."""
    named = module.backbone.named_modules()
    found = [(n, m) for n, m in named if isinstance(m, _BatchNorm) and m.training]
    by_task = isinstance(module.balancer, GradientBalancer)
    if not found or not (by_task or module.accumulate_grad_batches > 1):
        return
    layer = f"{type(found[0][1]).__name__} {found[0][0]!r} ({len(found)} such layers in all)"
    if by_task and module.engine not in {"auto", "loop"}:
        raise ConfigError(
            "model.engine: batch norm mixes the samples of tasks, so with a gradient balancer it "
            f"must be 'auto' or 'loop', found {module.engine!r} and {layer}"
        )
    warnings.warn(
        "model.backbone: batch norm normalises each task (of a gradient balancer) and each part of "
        "accumulate_grad_batches alone in training, but all samples by one average of their "
        f"statistics in evaluation; group or layer norm has no such gap; found {layer}",
        stacklevel=4,
    )


def _check_conditioning(module: MultiTaskDiffusion) -> None:
    if not 0 <= module.class_dropout < 1:
        raise ConfigError(
            f"model.class_dropout: must be at least 0 and below 1, found {module.class_dropout}"
        )
    if module.null_class is not None:
        return
    why = "the backbone has no null class (num_classes or class_dropout_prob is 0)"
    if module.class_dropout:
        raise ConfigError(
            f"model.class_dropout: must be 0 because {why}, found {module.class_dropout}"
        )
    if module.guidance_scale != 1.0:
        raise ConfigError(
            f"model.guidance_scale: must be 1 because {why}, found {module.guidance_scale}"
        )


def _check_channels(module: MultiTaskDiffusion) -> None:
    needed = module.process.output_channels(module.image_shape[0])
    found = int(module.backbone.out_channels)  # type: ignore[arg-type]
    if found != needed:
        raise ConfigError(
            f"model.backbone.out_channels: variance_type {module.process.variance_type!r} needs "
            f"{needed}, found {found}"
        )
