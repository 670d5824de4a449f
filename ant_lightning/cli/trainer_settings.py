"""Checks of settings and of Trainer flags, names of loggers; the flag that an error is about."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant_lightning.errors import ConfigError, found_at

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
}
_LOGGERS = ("TensorBoardLogger", "WandbLogger", "MLFlowLogger", "CSVLogger", "CometLogger")
# If one of these is None, the Trainer fails with an error that does not name it.
_NEVER_NONE = ("detect_anomaly", "max_steps", "overfit_batches")


def with_classes_of_loggers(args: Sequence[str]) -> list[str]:
    """The arguments with a short name of a logger, in any case, replaced by that of its class.

    >>> from ant_lightning.cli.trainer_settings import with_classes_of_loggers
    >>> with_classes_of_loggers(["fit", "--trainer.logger=wandb", "--trainer.logger", "CSV"])
    ['fit', '--trainer.logger=WandbLogger', '--trainer.logger', 'CSVLogger']
    """
    found = list(args)
    for i, arg in enumerate(found):
        name, sign, value = arg.partition("=")
        if name == "--trainer.logger" and sign:
            found[i] = f"{name}={_logger_class(value)}"
        elif name == "--trainer.logger" and i + 1 < len(found):
            found[i + 1] = _logger_class(found[i + 1])
    return found


def _logger_class(name: str) -> str:
    """The class of a logger that is named by a short name; other names as they are."""
    known = {each.lower().removesuffix("logger"): each for each in _LOGGERS}
    return known.get(name.lower().removesuffix("logger"), name)


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
    of_run = named and any(any(Path(path).glob(each)) for each in ("*.ckpt", "checkpoints/*.ckpt"))
    if named and not of_run and not Path(path).is_file():
        raise ConfigError(
            f"ckpt_path: must be a checkpoint, the folder of a run that has one, or last, "
            f"{found_at(path)}"
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
    _check_loggers(settings.get("logger"))
    callbacks = settings.get("callbacks")
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        path = callback.get("class_path") if hasattr(callback, "get") else callback
        kind = str(path).rpartition(".")[-1]
        if kind in _REPLACED:
            raise ConfigError(f"trainer.callbacks: must not have {kind}; use {_REPLACED[kind]}")


def _check_loggers(given: Any) -> None:  # noqa: ANN401 - a logger's settings, or a list of them
    """Refuse short names in a config file, where the parser needs the name of the class."""
    for logger in given if isinstance(given, list) else [given]:
        name = logger.get("class_path") if hasattr(logger, "get") else logger
        if isinstance(name, str) and _logger_class(name) != name:
            raise ConfigError(
                f"trainer.logger: must be the name of a class, here {_logger_class(name)}, found "
                f"{name}"
            )


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
