"""The settings that a run recorded in its folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ant_lightning.cli.config_files import check_config_file, load_yaml
from ant_lightning.cli.renamed import with_new_names
from ant_lightning.errors import ConfigError
from ant_lightning.runtime.run_files import newest_record, no_run


def record_file(folder: Path) -> Path:
    """The newest record of a run.

    Raises:
        ConfigError: If the folder is not that of a run.
    """
    record = newest_record(folder)
    if record is None:
        raise no_run(folder, "no config.yaml")
    check_config_file(record)
    return record


def record_of(folder: Path) -> dict[str, Any]:
    """The settings in the newest record of a run, in today's names.

    Raises:
        ConfigError: If the folder is not that of a run, or the record is no config.
    """
    text = record_file(folder).read_text(encoding="utf8")
    found: dict[str, Any] = with_new_names(load_yaml(text))
    return found


_OF_A_RUN = ("validate", "test", "predict")


def need_run(arguments: list[str]) -> None:
    """Refuse a command of a run that is given neither a run nor settings.

    Raises:
        ConfigError: Then.
    """
    command, *rest = arguments
    given = re.compile(r"--(config|model|data|help|print_config)\b|-[hc]")
    has_run = bool(rest) and not rest[0].startswith("-")
    if command in _OF_A_RUN and not has_run and not any(map(given.match, rest)):
        raise ConfigError(
            "RUN: needed, found nothing; give the folder of a run, such as "
            f"`{command} runs/NAME/version_0`, or a --config and a --ckpt_path"
        )


def with_run(arguments: list[str]) -> list[str]:
    """The arguments of a command in which `RUN` stands for the config and checkpoint of a run.

    It is the first argument of `validate`, `test` and `predict`: a folder, or a checkpoint in it.

    Raises:
        ConfigError: If it is not that of a run.
    """
    command, *rest = arguments
    if command not in _OF_A_RUN or not rest or rest[0].startswith("-"):
        return arguments
    run, *options = rest
    folder = Path(run).parent.parent if Path(run).is_file() else Path(run)
    found = [f"--config={record_file(folder)}", f"--ckpt_path={run}"]
    trainer = record_of(folder).get("trainer")
    # A run that trained without validation: `validate` would measure nothing and say nothing.
    is_off = isinstance(trainer, dict) and trainer.get("limit_val_batches") == 0
    if command == "validate" and is_off:
        found.append("--trainer.limit_val_batches=1.0")
    return [command, *found, *options]


def about_relative_path(arguments: list[str], message: str) -> str:
    """What to add to an error about a relative path in the record of a run."""
    found = re.search(r"found nothing at (\S+)$", message)
    run = next((each for each in arguments[1:2] if not each.startswith("-")), None)
    if found is None or run is None or Path(found[1]).is_absolute():
        return ""
    record = newest_record(Path(run).parent.parent if Path(run).is_file() else Path(run))
    if record is None or found[1] not in record.read_text(encoding="utf8"):
        return ""
    return f" (as {record} says, relative to the folder in which `fit` ran)"
