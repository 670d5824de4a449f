"""What a checkpoint says of the run that wrote it, compared with the run that reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ant_lightning.balancing.shards import is_sharded
from ant_lightning.clustering import TimestepClusters
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from ant_lightning.modules.multitask import MultiTaskDiffusion

__all__ = ["FORMAT_VERSION", "restore_state", "saved_state", "schedule_summary"]

FORMAT_VERSION = 1


def saved_state(module: MultiTaskDiffusion) -> dict[str, Any]:
    """What no hyperparameter file should decide: clusters and counts."""
    return {
        "format_version": FORMAT_VERSION,
        "boundaries": list(module.clusters.boundaries),
        "cluster_history": [(step, list(each)) for step, each in module.cluster_history],
        "num_skipped_steps": module.num_skipped_steps,
        "backbone": _class_name(module),
        "prediction_type": module.process.prediction_type,
        "variance_type": module.process.variance_type,
        "schedule": schedule_summary(module),
        "train_interval": module.train_interval and list(module.train_interval),
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
            "ckpt_path: not a checkpoint of ant_lightning; for official weights use model.init_from"
        )
    version = saved["format_version"]
    if version > FORMAT_VERSION:
        raise ConfigError(
            f"ckpt_path: the checkpoint has format version {version}, written by a newer "
            f"ant_lightning; this one reads versions up to {FORMAT_VERSION}"
        )
    history = [(step, tuple(each)) for step, each in saved.get("cluster_history", ())]
    history = history or [(0, tuple(saved["boundaries"]))]
    ours = {
        "model.prediction_type": (module.process.prediction_type, saved["prediction_type"]),
        "model.backbone": (_class_name(module), saved["backbone"]),
        "model.clustering (its boundaries)": (
            list(module.cluster_history[0][1]),
            list(history[0][1]),
        ),
    }
    if "schedule" in saved:
        ours["model.schedule (T, log-SNR at start, middle, end)"] = (
            schedule_summary(module),
            saved["schedule"],
        )
    for name, (now, then) in ours.items():
        if now != then:
            raise ConfigError(f"{name}: the checkpoint has {then}, the settings say {now}")
    module.cluster_history = history
    if len(history) > 1:
        module.clusters = TimestepClusters(history[-1][1])
    module.num_skipped_steps = saved["num_skipped_steps"]
    module.trained_steps = checkpoint["global_step"]


def _class_name(module: MultiTaskDiffusion) -> str:
    """That of the backbone; FSDP2 puts a class of its own in front of it."""
    kind = type(module.backbone)
    return (kind.__bases__[-1] if is_sharded(module.backbone.parameters()) else kind).__name__
