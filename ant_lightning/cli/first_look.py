"""Finds mistakes in a command line and its files before PyTorch and Lightning are imported.

Importing them takes many times longer than noticing a missing file. Everything refused here is
also refused by the parser or the modules; what this check does not understand is left to them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant_lightning.cli.config_files import check_config_file, config_paths, load_yaml
from ant_lightning.cli.messages import needed, no_such_option, suggestion, unknown_class
from ant_lightning.cli.source_names import arguments_of, class_names, lightning_arguments
from ant_lightning.cli.trainer_settings import check_run_settings, check_trainer_settings
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["first_look", "top_settings"]

# Groups of settings whose class is always the same.
_RUN_GROUPS = {"ema": "EMA", "checkpoint": "Checkpoints", "samples": "SampleWriter"}
_ENCODE_GROUPS = {"first_stage": "FirstStage", "cache": "LatentWriter"}
_GROUPS = _RUN_GROUPS | _ENCODE_GROUPS
_FLAGS = ("-h", "--help", "--print_config")
# Settings whose short names mean our classes, unless the user brings their own.
_OURS = {
    f"model.{name}" for name in ("balancer", "clustering", "schedule", "sampler", "loss_weighting")
}
# Importing another package may add classes, which then have short names too.
_KNOWN_PACKAGES = {"ant_lightning", "lightning", "torch", "torchvision", "torchjd", "diffusers"}


def first_look(arguments: Sequence[str]) -> None:
    """Look for mistakes in the arguments of a command.

    Raises:
        ConfigError: If there is one; names the setting or file, the rule and the value found.
    """
    command, *args = arguments
    if command == "report":
        for folder in args:
            if not folder.startswith("-") and not Path(folder).is_dir():
                raise ConfigError(f"report: must be the log folder of a run: {folder}")
        return
    known = top_settings(command)
    for path in config_paths(args):
        if not path.lstrip().startswith("{"):
            check_config_file(path, known=known)
    options = _options(args)
    if known is None or options is None:
        return
    unknown = [text for name, _, text in options if not _is_option(name, known)]
    if unknown:
        raise ConfigError(no_such_option(" ".join(unknown), _option_names(known)))
    settings: dict[str, Any] = {}
    for name, value, _ in options:
        if name in {"config", "c"}:
            _merge(settings, _loaded_file(value))
        else:
            _merge(settings, _nested(name, value))
    _check_run(settings)
    _check_trainer(settings.get("trainer"))
    _check_groups(settings)
    _check_classes(settings)
    missing = [name for name in ("data", "model") if settings.get(name) is None]
    if missing and command != "encode":
        raise ConfigError(needed(", ".join(missing)))


def top_settings(command: str) -> list[str] | None:
    """Top-level names allowed in a command's config; None if unknown."""
    if command == "encode":
        return sorted({"config", "print_config", "data", "device", *_ENCODE_GROUPS})
    method = lightning_arguments("trainer/trainer.py", "Trainer", command)
    if method is None:
        return None
    handed_over = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
    own = {"config", "print_config", "seed_everything", "trainer", "model", "data", *_RUN_GROUPS}
    return sorted(own | (method - handed_over) | ({"images"} if command == "test" else set()))


def _options(args: Sequence[str]) -> list[tuple[str, str, str]] | None:
    """Name, value and text of each option; None if the command line has any other form."""
    found, rest = [], list(args)
    while rest:
        text = rest.pop(0)
        name, sign, value = text.partition("=")
        if not re.fullmatch(r"--[A-Za-z]\w*(\.\w+)*\+?|-c", name) or name in _FLAGS:
            return None
        if name.endswith(".help"):
            return None
        if not sign:
            if not rest or rest[0].startswith("--"):
                return None
            value = rest.pop(0)
            text = f"{text} {value}"
        found.append((name.lstrip("-"), value, text))
    return found


def _is_option(name: str, known: Sequence[str]) -> bool:
    first, *rest = name.removesuffix("+").split(".")
    if first not in known and first != "c":
        return False
    arguments = _group_arguments(first)
    return not rest or arguments is None or rest[0] in arguments


def _group_arguments(name: str) -> set[str] | None:
    if name == "trainer":
        return lightning_arguments("trainer/trainer.py", "Trainer")
    return arguments_of(_GROUPS[name]) if name in _GROUPS else None


def _option_names(known: Sequence[str]) -> list[str]:
    nested = [
        f"--{group}.{name}"
        for group in ("trainer", *_GROUPS)
        if group in known
        for name in sorted(_group_arguments(group) or ())
    ]
    return [*nested, *(f"--{name}" for name in known)]


def _loaded_file(value: str) -> Any:  # noqa: ANN401 - whatever it holds
    path = Path(value)
    return _loaded(path.read_text(encoding="utf8") if path.is_file() else value)


def _loaded(text: str) -> Any:  # noqa: ANN401
    try:
        return load_yaml(text)
    except Exception:  # not YAML: the parser decides whether a string is valid here
        return text


def _nested(name: str, value: str) -> dict[str, Any]:
    """An option as a nested config; a `+` option becomes an opaque value that no check inspects."""
    inner: Any = object() if name.endswith("+") else _loaded(value)
    for part in reversed(name.removesuffix("+").split(".")):
        inner = {part: inner}
    return inner  # type: ignore[no-any-return]


def _merge(into: dict[str, Any], settings: Any) -> None:  # noqa: ANN401
    """Merge settings, later ones first; `init_args` are moved up beside their `class_path`."""
    if not isinstance(settings, dict):
        return
    for name, value in settings.items():
        if name == "init_args":
            _merge(into, value)
            continue
        before = into.get(name)
        if name == "class_path" and before not in (None, value):
            into.clear()  # another class: the parser keeps those old settings that still fit
        if isinstance(value, dict):
            if isinstance(before, str):
                before = {"class_path": before}
            into[name] = inner = before if isinstance(before, dict) else {}
            _merge(inner, value)
        elif isinstance(value, str) and isinstance(before, dict) and "class_path" in before:
            _merge(before, {"class_path": value})
        else:
            into[name] = value


def _check_run(settings: dict[str, Any]) -> None:
    kinds = {"seed_everything": int, "weights_only": bool | None, "ckpt_path": str}
    given = {name: kind for name, kind in kinds.items() if name in settings}
    check_run_settings({n: settings[n] for n, k in given.items() if isinstance(settings[n], k)})
    samples = settings.get("samples")
    for name in ("num_images", "batch_size"):
        value = samples.get(name) if isinstance(samples, dict) else None
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"samples.{name}: must be at least 1, found {value}")


def _check_trainer(trainer: Any) -> None:  # noqa: ANN401
    """Check flags with plain values; strings are left to the parser, which may convert them."""
    if isinstance(trainer, dict):
        plain = {
            name: value
            for name, value in trainer.items()
            if value is None or isinstance(value, int | float) or name == "gradient_clip_algorithm"
        }
        callbacks = trainer.get("callbacks")
        if isinstance(callbacks, list) and all(isinstance(each, dict) for each in callbacks):
            plain["callbacks"] = callbacks
        check_trainer_settings(plain)


def _check_groups(settings: dict[str, Any]) -> None:
    """Check the names of settings inside groups whose class is fixed."""
    for group in ("trainer", *_GROUPS):
        known, inner = _group_arguments(group), settings.get(group)
        if known is None or not isinstance(inner, dict) or "class_path" in inner:  # a file name
            continue
        for name in inner:
            if name not in known:
                hint = suggestion(name, sorted(known))
                raise ConfigError(f"{group}.{name}: the command has no such setting{hint}")


def _check_classes(settings: dict[str, Any]) -> None:
    """Check the names of our classes and of their arguments."""
    places = list(_class_paths(settings, ""))
    if any("." in found and found.split(".")[0] not in _KNOWN_PACKAGES for _, found, _ in places):
        return
    for setting, found, inner in places:
        last = found.rpartition(".")[-1]
        ours = found.startswith("ant_lightning.")
        short = setting in _OURS and found.isidentifier() and not Path(found).exists()
        if (ours or short) and last not in class_names():
            raise ConfigError(unknown_class(setting, found))
        known = arguments_of(last) if ours or short else None
        if known is None:
            continue
        for name in inner:
            if name not in known | {"class_path", "dict_kwargs"}:
                hint = suggestion(name, sorted(known))
                raise ConfigError(f"{setting}.{name}: {last} has no such option{hint}")


def _class_paths(value: Any, setting: str) -> Iterator[tuple[str, str, dict[str, Any]]]:  # noqa: ANN401
    """The setting, class and inner settings of each class that is named."""
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield setting, value["class_path"], value
        for name, inner in value.items():
            yield from _class_paths(inner, f"{setting}.{name}" if setting else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _class_paths(_flat(inner), setting)
    elif isinstance(value, str) and setting in {"model", "data", *_OURS}:
        yield setting, value, {}


def _flat(entry: Any) -> Any:  # noqa: ANN401
    """A list entry with its `init_args` moved up beside its `class_path`."""
    flat: dict[str, Any] = {}
    _merge(flat, entry)
    return flat
