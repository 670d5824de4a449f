"""Specialists: checkpoints trained on one interval, checked against a multi-task model."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ant_lightning.backbones.official_checkpoints import fill_backbone, read_checkpoint
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from ant_lightning.models.module import MultiTaskDiffusion

# What a specialist must have in common with the multi-task model: its name in checkpoints, and the
# setting that an error names. The interval is compared last: another schedule gives other clusters,
# and then the schedule is the error to report.
_SAME = {
    "backbone": "model.backbone",
    "schedule": "model.process.schedule (T, log-SNR at start, middle, end)",
    "prediction_type": "model.process.prediction_type",
    "variance_type": "model.process.variance_type",
    "train_interval": "model.timesteps.interval",
}


class Specialist(NamedTuple):
    """A checkpoint that was trained on one interval.

    Attributes:
        path: The file.
        interval: `[start, stop)`.
        budget: How it was matched with the multi-task model: `iterations` or `samples`.
        steps: Its optimizer steps.
    """

    path: Path
    interval: tuple[int, int]
    budget: str
    steps: int


def find_specialists(
    module: MultiTaskDiffusion,
    paths: Mapping[str, Sequence[str] | None],
    intervals: Sequence[tuple[int, int]] | None,
) -> list[Specialist]:
    """Check that each budget has a fitting checkpoint for each interval.

    Args:
        module: The multi-task model.
        paths: The checkpoints of each budget; `None` for a budget without specialists.
        intervals: `[start, stop)` each; by default the module's clusters.

    Raises:
        ConfigError: If one is missing, was trained on another interval, with another backbone,
            schedule or prediction, or (budget `iterations`) for another number of steps.
    """
    num_timesteps = module.process.num_timesteps
    ends = [(int(a), int(b)) for a, b in intervals or pairwise(module.clusters.boundaries)]
    for start, stop in ends:
        if not 0 <= start < stop <= num_timesteps:
            raise ConfigError(
                f"intervals: must satisfy 0 <= start < stop <= {num_timesteps}, found "
                f"[{start}, {stop})"
            )
    found = []
    for budget, files in paths.items():
        if files and len(files) != len(ends):
            missing = ends[len(files) :]
            which = f"; the first that is missing is for {list(missing[0])}" if missing else ""
            raise ConfigError(
                f"by_{budget}: must be one checkpoint for each of the {len(ends)} intervals "
                f"{[list(each) for each in ends]}, found {len(files)}{which}"
            )
        # A budget without specialists has no files.
        for i, (file, interval) in enumerate(zip(files or (), ends, strict=False)):
            found.append(
                check_specialist(module, Path(file), interval, budget, f"by_{budget}[{i}]")
            )
    return found


def specialist_network(
    module: MultiTaskDiffusion, specialist: Specialist, *, averaged: bool
) -> nn.Module:
    """A copy of the module's backbone with the specialist's weights.

    Args:
        module: The multi-task model.
        specialist: One that `find_specialists` found.
        averaged: Whether to load its EMA weights, as for the multi-task model.

    Raises:
        ConfigError: If the weights do not fit the backbone.
    """
    network: nn.Module = copy.deepcopy(module.backbone)
    content, weights = read_checkpoint(specialist.path), "ema" if averaged else "model"
    # With an adapter the file holds the adapter alone.
    held = module.not_stored
    fill_backbone(network, content, path=specialist.path, weights=weights, held=held)  # type: ignore[arg-type]
    return network.eval().requires_grad_(False).to(module.device)


def check_specialist(
    module: MultiTaskDiffusion,
    path: Path,
    interval: tuple[int, int] | None,
    budget: str,
    where: str,
) -> Specialist:
    """The specialist in a file, if it fits the module.

    Args:
        module: The multi-task model.
        path: The file.
        interval: What it must be trained on; `None` for its own.
        budget: See `Specialist`.
        where: The argument in errors.

    Raises:
        ConfigError: If it is none of a specialist, or differs from the module.
    """
    if not path.is_file():
        raise ConfigError(f"{where}: must be an existing checkpoint, found no {path}")
    content = read_checkpoint(path)
    saved = content.get("ant_lightning") or {}
    if saved.get("train_interval") is None:
        raise ConfigError(
            f"{where}: must be the checkpoint of a specialist (fit with model.timesteps.interval), "
            f"found {path}"
        )
    steps = int(content["global_step"])
    if interval is None:
        start, stop = saved["train_interval"]
        interval = int(start), int(stop)
    ours = {**module.checkpoint_state().state_dict(), "train_interval": list(interval)}
    pairs = {setting: (ours[name], saved[name]) for name, setting in _SAME.items()}
    if module.adapter is not None or saved.get("adapter") is not None:
        for name in ("adapter", "base_weights"):
            pairs[f"model.{name}"] = (ours.get(name), saved.get(name))
    # 0: the module's weights do not come from a checkpoint that counts steps.
    if budget == "iterations" and module.trained_steps:
        pairs["optimizer steps"] = (module.trained_steps, steps)
    for setting, (expected, found) in pairs.items():
        if found != expected:
            raise ConfigError(
                f"{where}: must have {setting} {expected} like the multi-task model for the "
                f"interval {list(interval)}, found {found} in {path}"
            )
    return Specialist(path, interval, budget, steps)
