"""Checks of settings and of Trainer flags, names of loggers; the flag that an error is about."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from ant_lightning.cli.config_files import load_yaml
from ant_lightning.cli.logger_names import (
    is_known_logger,
    placed_loggers,
    places_of,
    with_logger_classes,
)
from ant_lightning.cli.merged_settings import merged_settings
from ant_lightning.errors import ConfigError, found_at
from ant_lightning.runtime.run_files import found_runs, has_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

_OURS = {
    "gradient_clip_val": (None, "model.optimization.clip_grad_norm"),
    "gradient_clip_algorithm": (None, "model.optimization.clip_grad_norm"),
    "accumulate_grad_batches": (
        1,
        "model.optimization.accumulate_grad_batches (of an autoencoder: a larger data.batch_size)",
    ),
}
# Callbacks that take over the step, copy the module, or double a callback that every run has.
_REPLACED = {
    "EMA": "ema",
    "EMAWeightAveraging": "ema",
    "WeightAveraging": "ema",
    "StochasticWeightAveraging": "ema",
    "Checkpoints": "checkpoint",
    "SampleWriter": "samples",
    "GradientAccumulationScheduler": _OURS["accumulate_grad_batches"][1],
    "LearningRateFinder": "model.optimization.optimizer",
    "BatchSizeFinder": "data.batch_size",
}
# Lightning accepts any number for these, and does something else with one below the least.
_LEAST = {
    "log_every_n_steps": 1,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
    "min_steps": 0,
    "min_epochs": 0,
    "max_steps": -1,
    "max_epochs": -1,
}
# If one of these is None, the Trainer fails with an error that does not name it.
_NEVER_NONE = ("detect_anomaly", "max_steps", "overfit_batches")
_OF_TRAINER = ("fit", "validate", "test", "predict", "diagnose")
# What the parser hands on to any logger that follows, if it has such a setting.
_PLACE = {
    "trainer": {"logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs"}}}
}
_LOGGER_OPTION = re.compile(r"--trainer(\.logger(\+|\.class_path)?)?")


def with_classes_of_loggers(args: Sequence[str]) -> list[str]:
    """The arguments with short names of loggers, in any case, replaced by those of their classes.

    Each keeps its runs where the one before does, and the first in `runs`.

    >>> from ant_lightning.cli.trainer_settings import with_classes_of_loggers
    >>> with_classes_of_loggers(["fit", "--trainer.logger", "CSV"])[-1]
    '--trainer.logger=CSVLogger'
    >>> with_classes_of_loggers(["fit", "--trainer.logger=my.Logger", "--trainer.logger+=csv"])[-1]
    '--trainer.logger=["my.Logger", {"class_path": "CSVLogger", "init_args": {"save_dir": "runs"}}]'
    """
    found = list(args)
    for i, arg in enumerate(found):  # which grows after `i`
        name, sign, value = arg.partition("=")
        if not _LOGGER_OPTION.fullmatch(name) or i + (not sign) >= len(found):
            continue
        try:
            options = _with_classes(name, value if sign else found[i + 1], found[1:i])
        except (ConfigError, OSError, TypeError, YAMLError):  # the parser says it; a date, say
            continue
        found[i : i + 1 + (not sign)] = [f"{name}={value}" for name, value in options]
    if found[:1] and found[0] in _OF_TRAINER and _needs_place(found[1:]):
        found.insert(1, f"--config={_text(_PLACE)}")
    return found


def _needs_place(args: Sequence[str]) -> bool:
    """Whether a logger with a short name has no `save_dir`."""
    try:
        trainer = (merged_settings(args) or {}).get("trainer")
    except (OSError, YAMLError, ValueError):  # of a file, which the first look says
        return False
    given = trainer.get("logger") if isinstance(trainer, dict) else None
    for logger in given if isinstance(given, list) else [given]:
        settings = logger if isinstance(logger, dict) else {"class_path": logger}
        inner = settings.get("init_args") or settings
        if is_known_logger(settings.get("class_path")) and "save_dir" not in inner:
            return True
    return False


def _with_classes(name: str, value: str, before: Sequence[str]) -> list[tuple[str, str]]:
    """An option that names loggers, as one or two; `before` are the options before it."""
    given = load_yaml(Path(value).read_text("utf8") if value.endswith(".yaml") else value)
    if name == "--trainer":
        if not isinstance(given, dict):
            return [(name, value)]
        logger = [("--trainer.logger", _text(given.pop("logger")))] if "logger" in given else []
        return [(name, _text(given)), *logger]  # the next option to be looked at
    given = with_logger_classes(given)
    trainer = (merged_settings(before) or {}).get("trainer")
    old = trainer.get("logger") if isinstance(trainer, dict) else None
    is_added = name.endswith("+")
    if not is_added and not isinstance(given, list):
        place, new = (each if isinstance(each, dict) else {} for each in (old, given))
        names = places_of(new.get("class_path", given)).items()
        # The parser keeps the arguments that both classes have.
        renamed = {own: place.get(each) for own, each in names if own != each}
        option, has = name.removesuffix(".class_path"), new.get("init_args") or new
        known = [(f"{option}.{n}", _text(v)) for n, v in renamed.items() if v and n not in has]
        return [(name, _text(given)), *known]
    kept = [_as_parsed(each) for each in (old if isinstance(old, list) else [old]) if each]
    placed = placed_loggers([*kept, *(given if isinstance(given, list) else [given])])
    return [("--trainer.logger", _text(placed if is_added else placed[len(kept) :]))]


def _text(value: Any) -> str:  # noqa: ANN401 - whatever YAML holds
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _as_parsed(logger: Any) -> Any:  # noqa: ANN401 - a name, `true` or merged settings
    """The settings of a logger with its arguments in `init_args`, as the parser reads them."""
    if logger is True:  # Lightning's default
        return "TensorBoardLogger"
    if not isinstance(logger, dict) or "init_args" in logger:
        return logger
    outside = {name: logger[name] for name in ("class_path", "dict_kwargs") if name in logger}
    return outside | {"init_args": {n: v for n, v in logger.items() if n not in outside}}


def check_run_settings(settings: Any) -> None:  # noqa: ANN401 - a mapping or a namespace
    """Check the settings beside the trainer and the model: seed, `weights_only`, checkpoint.

    A value of a wrong type is left to the parser.

    Raises:
        ConfigError: If one breaks its rule; names the setting, the rule and the value found.
    """
    seed = settings.get("seed_everything", True)
    if seed is None or (type(seed) is int and not 0 <= seed < 2**32):
        raise ConfigError(
            f"seed_everything: must be from 0 to {2**32 - 1}, or true or false, found {seed}"
        )
    if settings.get("weights_only", True) in (None, False):
        raise ConfigError(
            "weights_only: must be true, as our checkpoints need no code to be read, found "
            f"{settings.get('weights_only')}; for other files use model.init_from"
        )
    path = settings.get("ckpt_path")
    named = isinstance(path, str) and path not in ("", "last") and "://" not in path
    if named and not has_checkpoint(Path(path)) and not Path(path).is_file():
        runs = found_runs(Path(path))
        raise ConfigError(
            "ckpt_path: must be a checkpoint, the folder of a run that has one, or last, "
            + (f"found {runs}" if runs else found_at(path))
        )


def check_trainer_settings(settings: Any) -> None:  # noqa: ANN401 - a mapping or a namespace
    """Refuse impossible numbers, and flags that manual optimization cannot honour.

    Raises:
        ConfigError: If there is one; names the flag, the rule, the value found and our setting.
    """
    for name, (neutral, replacement) in _OURS.items():
        value = settings.get(name)
        if value not in (None, neutral):
            raise ConfigError(
                f"trainer.{name}: must be left out, as the module makes the steps, found {value}; "
                f"use {replacement}"
            )
    for name in _NEVER_NONE:
        if settings.get(name, 0) is None:
            raise ConfigError(f"trainer.{name}: must have a value or be left out, found None")
    for name, least in _LEAST.items():
        value = settings.get(name)
        if type(value) in (int, float) and value < least:
            raise ConfigError(f"trainer.{name}: must be at least {least}, found {value}")
    interval = settings.get("val_check_interval")
    if type(interval) in (int, float) and not interval > 0:
        raise ConfigError(f"trainer.val_check_interval: must be above 0, found {interval}")
    callbacks = settings.get("callbacks")
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        path = callback.get("class_path") if hasattr(callback, "get") else callback
        kind = str(path).rpartition(".")[-1]
        if kind in _REPLACED:
            raise ConfigError(f"trainer.callbacks: must not have {kind}; use {_REPLACED[kind]}")


def trainer_error(error: Exception, settings: Any) -> ConfigError:  # noqa: ANN401
    """An error of the Trainer as a `ConfigError` that names the flag it is about.

    That is the flag which the message names first, or else the one whose value it repeats.
    """
    # Lightning writes `max_steps`, max-steps or devices='0', so words are compared loosely.
    text = " ".join(str(error).split()).rstrip(".")
    flags = {name: value for name, value in vars(settings).items() if value is not None}
    places = [(False, _place(name, text), name) for name in flags]
    places += [(True, _place(v, text), name) for name, v in flags.items() if isinstance(v, str)]
    named = [name for _, at, name in sorted(places) if at >= 0]
    if not named:
        hardware = ("accelerator", "devices", "strategy", "precision")
        found = ", ".join(f"{name} {flags[name]}" for name in hardware if name in flags)
        return ConfigError(f"trainer: {text}, found {found}")
    value = str(flags[named[0]])
    found = "" if _place(value, text) >= 0 else f", found {value}"
    return ConfigError(f"trainer.{named[0]}: {text}{found}")


def _place(word: str, text: str) -> int:
    """Position of a word in a message, with `-` and `_` taken as equal; -1 if it is missing."""
    pattern = rf"(?<![a-z0-9]){re.escape(word.replace('-', '_'))}"
    found = re.search(pattern, text.replace("-", "_"), re.IGNORECASE)
    return found.start() if found else -1
