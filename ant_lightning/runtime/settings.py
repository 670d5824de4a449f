"""The settings of a run by name, and how the settings of two runs differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ant_lightning.files.identity import differences

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["changed_settings", "flat_settings", "trained_settings"]

_GROUPS = ("seed_everything", "ema", "data", "model")
# These change speed, files or how images are drawn, but not what is trained.
_NEUTRAL = (
    "data.num_workers",
    "model.optimization.accumulate_grad_batches",
    "model.sampling.clip_denoised",
    "model.tasks.engine",
    "model.export",
    "model.sampling.guidance_scale",
    "model.sampling.guided_channels",
    "model.optimization.max_skipped_steps",
    "model.sampling.sampler",
)


def trained_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides what is trained."""
    return {name: config[name] for name in _GROUPS if name in config}


def changed_settings(
    stored: Mapping[str, Any], current: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The settings that decide what is trained and differ, each with both values.

    Settings that only one side has, because another version of this package wrote it, are ignored.
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
    """Flatten nested settings to `model.optimization.optimizer.lr: 0.1`.

    `model.optimization.optimizer` holds the class.
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
    """A class's name; of another package's with the package, which may have one of that name."""
    package, name = path.partition(".")[0], path.rpartition(".")[-1]
    return name if package in ("ant_lightning", "torch", "lightning", "diffusers") else path
