"""Settings of a run as flat names and values, and the differences between two runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ant_lightning.files.identity import differences

if TYPE_CHECKING:
    from collections.abc import Mapping

# Packages whose classes stored settings may name without being asked.
TRUSTED = ("ant_lightning", "torch", "lightning", "diffusers")

# The parts of a configuration that decide what is trained; the Trainer's flags do not.
_GROUPS = ("seed_everything", "ema", "data", "model")
# Settings inside these parts that change speed, files or sampling, but not what is trained.
_NEUTRAL = (
    "data.num_workers",
    "model.optimization.accumulate_grad_batches",
    "model.sampling.clip_denoised",
    "model.tasks.engine",
    "model.export",
    "model.sampling.guidance_scale",
    "model.sampling.guided_channels",
    "model.sampling.guidance_interval",
    "model.sampling.guide_checkpoint",
    "model.sampling.guide_backbone",
    "model.sampling.guide_weights",
    "model.optimization.max_skipped_steps",
    "model.sampling.sampler",
)


def trained_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides what is trained."""
    return {name: config[name] for name in _GROUPS if name in config}


def changed_settings(
    stored: Mapping[str, Any], current: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Settings that affect training and differ, each as the pair `(stored, current)`.

    Settings that only one side has are ignored: another version of this package wrote that side.
    """
    then, now = flat_settings(trained_settings(stored)), flat_settings(trained_settings(current))
    both = then.keys() & now.keys()
    changed = differences(
        {name: then[name] for name in then if name in both},
        {name: now[name] for name in now if name in both},
    )
    return {name: pair for name, pair in changed.items() if not _is_neutral(name)}


def _is_neutral(name: str) -> bool:
    return name in _NEUTRAL or name.startswith(tuple(f"{each}." for each in _NEUTRAL))


def flat_settings(value: Any, name: str = "") -> dict[str, Any]:  # noqa: ANN401 - whatever YAML holds
    """Flatten nested settings to names such as `model.optimization.optimizer.lr`.

    A setting with a `class_path` becomes the class under its own name, and the arguments below it.
    """
    if not isinstance(value, dict):
        return {name: value}
    inner = dict(value)
    found: dict[str, Any] = {}
    if "class_path" in inner:
        found[name] = _class(str(inner.pop("class_path")))
        inner = {**(inner.get("init_args") or {}), **(inner.get("dict_kwargs") or {})}
    for key, each in inner.items():
        found |= flat_settings(each, f"{name}.{key}" if name else str(key))
    return found


def _class(path: str) -> str:
    """Name of a class: without its module in a known package, else the whole path.

    A package of the user may have a class of the same name.
    """
    package, name = path.partition(".")[0], path.rpartition(".")[-1]
    return name if package in TRUSTED else path
