"""What a checkpoint says of the run that wrote it, compared with the run that reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from ant_lightning.errors import ConfigError
from ant_lightning.models.checkpoint_content import check_weights
from ant_lightning.models.protocol import backbone_name
from ant_lightning.tasks.clusters import TimestepClusters

if TYPE_CHECKING:
    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["FORMAT_VERSION", "restore_state", "saved_state", "schedule_summary"]

FORMAT_VERSION = 1


def saved_state(module: MultiTaskDiffusion) -> dict[str, Any]:
    """What no hyperparameter file should decide: clusters and counts."""
    return {
        "format_version": FORMAT_VERSION,
        "boundaries": list(module.clusters.boundaries),
        "cluster_history": [(step, list(each)) for step, each in module.cluster_history],
        "num_skipped_steps": module.num_skipped_steps,
        "num_skipped_in_a_row": module.num_skipped_in_a_row,
        "world_size": module.trainer.world_size,
        "backbone": backbone_name(module.backbone),
        "balancer": _kind(module.balancer),
        "optimizer": _optimizer(module),
        "prediction_type": module.process.prediction_type,
        "variance_type": module.process.variance_type,
        "schedule": schedule_summary(module),
        "first_stage": None if module.latent_space is None else module.latent_space.fingerprint,
        "train_interval": module.timesteps.interval and list(module.timesteps.interval),
    }


def schedule_summary(module: MultiTaskDiffusion) -> list[float]:
    """T and the log-SNR of the first, the middle and the last timestep, to six digits."""
    log_snr = module.process.log_snr
    ends = [float(log_snr[t]) for t in (0, len(log_snr) // 2, -1)]
    return [len(log_snr), *(float(f"{value:.6g}") for value in ends)]


def restore_state(module: MultiTaskDiffusion, checkpoint: dict[str, Any]) -> None:
    """Compare a checkpoint with the settings, and take its counts and its clusters.

    The settings say which clusters a run starts with. Where training changed them, the checkpoint
    goes on with the last, under any callbacks.

    Raises:
        ConfigError: Naming what differs, with both values.
    """
    saved = checkpoint.get("ant_lightning")
    if saved is None:
        raise ConfigError(
            "ckpt_path: not a checkpoint of ant_lightning; for official weights use init_from"
        )
    version = saved.get("format_version")
    if type(version) is not int:
        raise ConfigError(f"ckpt_path: format_version must be a whole number, found {version!r}")
    if version > FORMAT_VERSION:
        raise ConfigError(
            f"ckpt_path: the checkpoint has format version {version}, written by a newer "
            f"ant_lightning; this one reads versions up to {FORMAT_VERSION}"
        )
    try:
        history = [(int(step), tuple(each)) for step, each in saved.get("cluster_history", ())]
        history = history or [(0, tuple(saved["boundaries"]))]
        last = TimestepClusters(history[-1][1])
        skipped, steps = int(saved["num_skipped_steps"]), int(checkpoint["global_step"])
        in_a_row, ranks = (int(saved.get(n, 0)) for n in ("num_skipped_in_a_row", "world_size"))
        _ = saved["prediction_type"], saved["backbone"]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            "ckpt_path: must hold what a run of ant_lightning says of itself, found "
            f"{error if isinstance(error, ConfigError) else repr(error)}"
        ) from error
    for name, (now, then) in _compared(module, saved, history[0][1]).items():
        if now != then:
            said = then, now
            raise ConfigError(f"{name}: the checkpoint has {said[0]}, the settings say {said[1]}")
    tasks = (module.clusters.num_tasks, module.clusters.num_timesteps)
    if (last.num_tasks, last.num_timesteps) != tasks:
        raise ConfigError(
            f"ckpt_path: its last clusters must be {tasks[0]} of {tasks[1]} timesteps, found "
            f"{last.num_tasks} of {last.num_timesteps}"
        )
    check_weights(module, checkpoint)
    module.cluster_history = history
    first = module.first_clusters  # may be a placebo, which boundaries alone do not show
    module.clusters = first if first.boundaries == last.boundaries else last
    module.num_skipped_steps = skipped
    module.num_skipped_in_a_row = in_a_row
    module.trained_steps = steps
    if _training(module):
        _tell_of_other_ranks(module, ranks)


def _compared(
    module: MultiTaskDiffusion, saved: dict[str, Any], boundaries: tuple[int, ...]
) -> dict[str, tuple[Any, Any]]:
    """What must agree: the value of this run and that of the checkpoint, by setting."""
    ours: dict[str, tuple[Any, Any]] = {
        "process.prediction_type": (module.process.prediction_type, saved["prediction_type"]),
        "backbone": (backbone_name(module.backbone), saved["backbone"]),
        "tasks.clustering (its boundaries; to keep the checkpoint's, use FixedClustering)": (
            list(module.cluster_history[0][1]),
            list(boundaries),
        ),
    }
    if "schedule" in saved:
        ours["process.schedule (T, log-SNR at start, middle, end)"] = (
            schedule_summary(module),
            saved["schedule"],
        )
    if "balancer" in saved:
        ours["tasks.balancer"] = (_kind(module.balancer), saved["balancer"])
    if saved.get("first_stage") and module.latent_space is not None:
        ours["first_stage (its fingerprint)"] = (
            module.latent_space.fingerprint,
            saved["first_stage"],
        )
    if saved.get("optimizer") and _training(module):
        ours["optimization.optimizer"] = (_optimizer(module), saved["optimizer"])
    return ours


def _kind(value: object) -> str | None:
    return None if value is None else type(value).__name__


def _training(module: MultiTaskDiffusion) -> bool:
    trainer = module._trainer
    return trainer is not None and trainer.state.fn == "fit"


def _optimizer(module: MultiTaskDiffusion) -> str | None:
    """The class of the optimizer that trains, whose state no other can go on with."""
    if not _training(module):
        return None
    optimizers = module.trainer.optimizers
    made = optimizers[0] if optimizers else module.optimizer_factory.make([torch.zeros(1)])[0]
    return _kind(made)


def _tell_of_other_ranks(module: MultiTaskDiffusion, then: int) -> None:
    """What depends on the number of ranks (0: not known) beside rounding, which the loader says."""
    now = module.trainer.world_size
    parts = module.backbone.modules()
    reasons = {
        "tasks.placement 'sorted' pairs images with other timesteps": module.tasks.placement
        == "sorted",
        "dropout inside the network draws other masks": any(
            isinstance(part, nn.Dropout) and part.p > 0 for part in parts
        ),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if then and then != now and found:
        rank_zero_warn(
            f"number of ranks: the checkpoint has {then}, this run {now}: {' and '.join(found)}, "
            "so results agree with those of the run that was stopped in distribution alone"
        )
