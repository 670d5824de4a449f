"""Specialist checkpoints: whether they belong to a multi-task model, and their networks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ant_lightning.backbones.checkpoints import load_official_checkpoint, read_checkpoint
from ant_lightning.errors import ConfigError
from ant_lightning.models.protocol import backbone_name
from ant_lightning.models.saved_state import schedule_summary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["Specialist", "check_intervals", "find_specialists", "specialist_network"]


class Specialist(NamedTuple):
    """A checkpoint that was trained on one interval.

    Attributes:
        path: The file.
        interval: `[start, stop)`.
        budget: `iterations` or `samples`.
        steps: Its optimizer steps.
    """

    path: Path
    interval: tuple[int, int]
    budget: str
    steps: int


def check_intervals(intervals: Sequence[tuple[int, int]], num_timesteps: int) -> None:
    """Check that intervals lie inside `[0, T)`.

    Raises:
        ConfigError: Naming the first that does not.
    """
    for start, stop in intervals:
        if not 0 <= start < stop <= num_timesteps:
            raise ConfigError(
                f"NegativeTransferGap.intervals: must satisfy 0 <= start < stop <= "
                f"{num_timesteps}, found [{start}, {stop})"
            )


def find_specialists(
    module: MultiTaskDiffusion,
    paths: Sequence[str],
    intervals: Sequence[tuple[int, int]],
    *,
    budget: str,
) -> list[Specialist]:
    """Check that there is a checkpoint for each interval, of the module's own kind.

    Raises:
        ConfigError: If one is missing, was trained on another interval, with another backbone,
            schedule or prediction, or (budget `iterations`) for another number of steps.
    """
    setting = f"NegativeTransferGap.by_{budget}"
    if len(paths) != len(intervals):
        missing = intervals[len(paths) :]
        which = f"; the first that is missing is for {list(missing[0])}" if missing else ""
        raise ConfigError(
            f"{setting}: must be one checkpoint for each of the {len(intervals)} intervals "
            f"{[list(each) for each in intervals]}, found {len(paths)}{which}"
        )
    return [
        _checked(module, Path(path), interval, budget, f"{setting}[{i}], interval {list(interval)}")
        for i, (path, interval) in enumerate(zip(paths, intervals, strict=True))
    ]


def specialist_network(
    module: MultiTaskDiffusion, specialist: Specialist, *, averaged: bool
) -> nn.Module:
    """A network like the module's backbone, with the specialist's weights.

    Args:
        module: The multi-task model.
        specialist: What `find_specialists` found.
        averaged: Whether its EMA weights are wanted, as for the multi-task model.

    Raises:
        ConfigError: If the weights do not fit the backbone.
    """
    network = copy.deepcopy(module.backbone)
    load_official_checkpoint(network, specialist.path, weights="ema" if averaged else "model")
    return network.eval().requires_grad_(False)


def _checked(
    module: MultiTaskDiffusion, path: Path, interval: tuple[int, int], budget: str, where: str
) -> Specialist:
    if not path.is_file():
        raise ConfigError(f"{where}: the specialist's checkpoint must exist, found no {path}")
    content = read_checkpoint(path)
    saved = content.get("ant_lightning") or {}
    if saved.get("train_interval") is None:
        raise ConfigError(
            f"{where}: must be the checkpoint of a specialist (fit with model.timesteps.interval), "
            f"found {path}"
        )
    steps = int(content["global_step"])
    wanted: dict[str, tuple[Any, Any]] = {
        "model.backbone": (backbone_name(module.backbone), saved["backbone"]),
        "model.process.schedule (T, log-SNR at start, middle, end)": (
            schedule_summary(module),
            saved["schedule"],
        ),
        "model.process.prediction_type": (module.process.prediction_type, saved["prediction_type"]),
        "model.process.variance_type": (module.process.variance_type, saved["variance_type"]),
        # Last: another schedule has other clusters, and its name is the better message.
        "model.timesteps.interval": (list(interval), saved["train_interval"]),
    }
    if budget == "iterations" and module.trained_steps:
        wanted["optimizer steps"] = (module.trained_steps, steps)
    for name, (ours, theirs) in wanted.items():
        if ours != theirs:
            raise ConfigError(
                f"{where}: {name} must be that of the multi-task model, {ours}, "
                f"found {theirs} in {path}"
            )
    return Specialist(path, interval, budget, steps)
