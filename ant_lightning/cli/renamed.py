"""Names of version 0.1 that have changed: classes, their arguments, options of the command line.

A command refuses an old name and says the new one. The settings of old runs are translated, so that
`load_run` and `--ckpt_path last` still work with these runs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import ant_lightning
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

_OLD_PATH = re.compile(
    r"ant_lightning\.(?:analysis|backbones|balancing|callbacks|clustering|data|diffusion|metrics"
    r"|modules|samplers)(?:\.\w+)*\.(\w+)"
)
_CLASSES = {"DiffusionProcess": "DiscreteDiffusion", "ReferenceStatistics": "ImageStatistics"}
_OPTIONS = {
    "optimizer": "model.optimization.optimizer",  # where Lightning's own command line has them
    "lr_scheduler": "model.optimization.lr_scheduler",
    "images": "ant-lightning score --images",
}
_GROUPS = {
    "process": ("schedule", "prediction_type", "variance_type", "loss_weighting"),
    "tasks": ("clustering", "balancer", "engine", "placement"),
    "timesteps": ("allocation",),
    "optimization": (
        *("optimizer", "lr_scheduler", "warmup_steps", "clip_grad_norm"),
        *("accumulate_grad_batches", "max_skipped_steps"),
    ),
    "sampling": ("sampler", "guidance_scale", "guided_channels", "clip_denoised"),
}
_OF_MODULES = {
    "task_weighting": "tasks.weighting",
    "timestep_sampling": "timesteps.method",
    "train_interval": "timesteps.interval",
    **{name: f"{group}.{name}" for group, names in _GROUPS.items() for name in names},
}
# In 0.1 these learned the variance by default; now their default process has that setting.
_LEARNED_VARIANCE = ("ADMModule", "DiTModule")
_OF_UNETS = {"learn_sigma": "out_channels"}
_ARGUMENTS = {
    **dict.fromkeys(("LDMModule", "MultiTaskDiffusion", *_LEARNED_VARIANCE), _OF_MODULES),
    "TaskAffinity": {"state_dir": "resume_dir"},
    **dict.fromkeys(("adm_imagenet64", "adm_imagenet256", "adm_p2_light"), _OF_UNETS),
}


def refuse_old_names(settings: dict[str, Any]) -> None:
    """Refuse names of version 0.1.

    Args:
        settings: Settings of a command, with `init_args` moved up beside their `class_path`.

    Raises:
        ConfigError: If there are any; names each old name and the new one.
    """
    found = {name: _OPTIONS[name] for name in settings if name in _OPTIONS}
    found |= dict(_old_names(settings, ""))
    if found:
        pairs = ", ".join(f"{old} for {new}" for old, new in found.items())
        raise ConfigError(f"config: must have the names of version 0.2, found {pairs}")


def with_new_names(settings: Any) -> Any:  # noqa: ANN401 - whatever YAML holds
    """The settings of a run, written by version 0.1 or later, in today's names."""
    if isinstance(settings, list):
        return [with_new_names(each) for each in settings]
    if isinstance(settings, str):
        return _new_class(settings)
    if not isinstance(settings, dict):
        return settings
    new = {name: with_new_names(value) for name, value in settings.items()}
    init = new.get("init_args")
    if isinstance(init, dict):
        kind = str(new.get("class_path")).rpartition(".")[-1]
        moved = _arguments(kind, init)
        for old in [name for name in init if name in moved]:
            group, _, name = moved[old].rpartition(".")
            value = init.pop(old)
            if old == "learn_sigma":  # of RGB images, with channels for the variance or without
                value = 6 if value else 3
            if (old, value) == ("engine", "vmap"):  # gone: one pass has rules for more layers
                value = "auto"
            (init.setdefault(group, {}) if group else init)[name] = value
        # Arguments that the loop moved into `process` need the class that takes them.
        if moved is _OF_MODULES and "class_path" not in init.get("process", {"class_path": ""}):
            if kind in _LEARNED_VARIANCE:
                init["process"].setdefault("variance_type", "learned_range")
            path = "ant_lightning.DiscreteDiffusion"
            init["process"] = {"class_path": path, "init_args": init["process"]}
    return new


def _arguments(kind: str, arguments: dict[str, Any]) -> dict[str, str]:
    """New name by old name of a class's arguments; the class may be the user's own module."""
    # Version 0.1 required both of these of every module, and no other class has both.
    is_module = {"backbone", "clustering"} <= arguments.keys()
    return _OF_MODULES if is_module else _ARGUMENTS.get(kind, {})


def _new_class(path: str) -> str:
    old = _OLD_PATH.fullmatch(path)
    name = _CLASSES.get(old.group(1), old.group(1)) if old else None
    return f"ant_lightning.{name}" if name in ant_lightning.__all__ else path


def _old_names(value: Any, path: str) -> Iterator[tuple[str, str]]:  # noqa: ANN401
    """Each old name, and the new one."""
    if isinstance(value, str) and _new_class(value) != value:
        yield value, _new_class(value)
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from _old_names(each, f"{path}[{i}]")
    elif isinstance(value, dict):
        init = value.get("init_args")
        inner = {**value, **(init if isinstance(init, dict) else {})}
        moved = _ARGUMENTS.get(str(value.get("class_path")).rpartition(".")[-1], {})
        for name, each in inner.items():
            if name == "init_args":
                continue
            setting = f"{path}.{name}" if path else name
            if name in moved:
                yield setting, f"{path}.{moved[name]}"
            yield from _old_names(each, setting)
