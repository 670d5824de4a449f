"""Checks of the commands that take runs: `app`, `export`, `report` and `sweep`."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import ant_lightning
from ant_lightning.cli.merged_settings import FLAGS
from ant_lightning.cli.messages import unknown_class
from ant_lightning.cli.records import record_file
from ant_lightning.errors import ConfigError
from ant_lightning.runtime.run_files import (
    RUN_OR_CHECKPOINT,
    found_runs,
    has_checkpoint,
    newest_record,
    no_run,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_FORMATS = ("diffusers", "official", "safetensors", "torch")
_WEIGHTS = ("ema", "live")


def check_runs(command: str, args: Sequence[str]) -> None:
    """Check that the runs given first are there, and that a sweep has values."""
    if set(args) & FLAGS:
        return
    options = options_of(args)
    if command == "export" and args and options.get("--to") not in _FORMATS:
        rule, found = ("must be", options["--to"]) if "--to" in options else ("needed,", "nothing")
        raise ConfigError(f"to: {rule} one of {', '.join(_FORMATS)}, found {found}")
    if command == "export" and options.get("--weights", "ema") not in _WEIGHTS:
        raise ConfigError(
            f"weights: must be one of {', '.join(_WEIGHTS)}, found {options['--weights']}"
        )
    if command == "sweep":
        _check_sweep(args, options)
    if command == "sweep" and args and not options.keys() & {"--guidance", "--ema"}:
        raise ConfigError(
            "guidance: needs values, as in --guidance 1 1.5 2, or --ema does; found none"
        )
    runs = [Path(run) for run in takewhile(lambda each: not each.startswith("-"), args)]
    runs = runs[:1] if command in {"export", "sweep"} else runs  # these take one
    what = "the folder of a run" if command in {"report", "sweep"} else RUN_OR_CHECKPOINT
    for run in runs:
        if not run.exists():
            raise no_run(run, "nothing", what)
    for run in runs:
        if command in {"report", "sweep"}:
            record_file(run)
        elif not has_checkpoint(run) and (found_runs(run) or newest_record(run)):
            raise no_run(run, "no checkpoint in it", what)


def _check_sweep(args: Sequence[str], options: Mapping[str, str]) -> None:
    """Check the values of a sweep, and the name of its extractor."""
    option = ""
    for each in args:
        option = each if each.startswith("--") else option
        value = each.partition("=")[2] if each.startswith("--") else each
        if option.partition("=")[0] in {"--guidance", "--ema"} and value:
            try:
                float(value)
            except ValueError as error:
                rule = "must be numbers with spaces between them, as in --guidance 1 1.5 2"
                name = option.partition("=")[0].removeprefix("--")
                raise ConfigError(f"{name}: {rule}, found {value}") from error
    extractor = options.get("--extractor", "")
    name = extractor.removeprefix("ant_lightning.")
    if name.isidentifier() and name not in ant_lightning.__all__:
        raise ConfigError(unknown_class("metrics.extractor", extractor))


def options_of(args: Sequence[str]) -> dict[str, str]:
    """The options, each with the argument after it."""
    options: dict[str, str] = {}
    for each, after in zip(args, [*args[1:], "nothing"], strict=False):
        name, sign, value = each.partition("=")
        options[name] = value if sign else after
    return options
