"""The settings that a run recorded in its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ant_lightning.cli.config_files import check_config_file, load_yaml
from ant_lightning.cli.renamed import with_new_names
from ant_lightning.errors import ConfigError
from ant_lightning.runtime.run_files import newest_record

if TYPE_CHECKING:
    from pathlib import Path


def record_file(folder: Path) -> Path:
    """The newest record of a run.

    Raises:
        ConfigError: If the folder is not that of a run.
    """
    record = newest_record(folder)
    if record is None:
        raise ConfigError(f"{folder}: must be the log folder of a run, found no config.yaml")
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
