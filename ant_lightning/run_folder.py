"""Where a run keeps its files: the newest checkpoint of `--ckpt_path last`, and whether it can."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from ant_lightning.callbacks.checkpoint_files import newest_whole
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    import lightning as L

__all__ = ["check_writable", "resume_from_last"]


def resume_from_last(config: Any, subcommand: str) -> None:  # noqa: ANN401 - the parser's namespace
    """Replace `ckpt_path: last` by the newest whole checkpoint, and log where that run logged.

    Lightning looks in the folder of the new run, which is empty unless `checkpoint.dirpath` or the
    logger's `version` is set. Here all versions of the logger's `name` are looked at, and the run
    that is found is gone on with in its own folder. Damaged files are passed over with a warning.
    If there is no checkpoint, `fit` starts from the beginning: a scheduler repeats one command.

    Raises:
        ConfigError: For other commands, if there is no checkpoint.
    """
    if config.ckpt_path != "last":
        return
    logger = config.trainer.get("logger")
    logger = logger[0] if isinstance(logger, list) and logger else logger
    own_folder = config.checkpoint.get("dirpath")
    folders = [Path(own_folder)] if own_folder else _folders(config.trainer, logger)
    found = newest_whole(path for folder in folders for path in folder.glob("*.ckpt"))
    if found is None:
        places = ", ".join(str(folder) for folder in folders) or "the log folder"
        if subcommand != "fit":
            raise ConfigError(f"ckpt_path: 'last' needs a checkpoint, found none in {places}")
        rank_zero_warn(
            f"ckpt_path: there is no checkpoint in {places}; training starts from the beginning"
        )
        config.ckpt_path = None
        return
    config.ckpt_path = str(found)
    name = found.parent.parent.name
    is_version = name.removeprefix("version_").isdecimal()
    if subcommand == "fit" and not own_folder and is_version and hasattr(logger, "init_args"):
        logger.init_args["version"] = int(name.removeprefix("version_"))


def check_writable(trainer: L.Trainer, dirpath: str | Path | None) -> None:
    """Try, before anything is trained, to write where logs and checkpoints will go.

    Raises:
        ConfigError: Naming the folder and the reason.
    """
    places = [("trainer.logger.save_dir", logger.save_dir) for logger in trainer.loggers]
    for setting, folder in [*places, ("checkpoint.dirpath", dirpath)]:
        if not trainer.is_global_zero or folder is None or "://" in str(folder):
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"0")
        except OSError as error:
            raise ConfigError(
                f"{setting}: must be a folder that can be written to, found {folder} "
                f"({error.strerror})"
            ) from error


def _folders(trainer: Any, logger: Any) -> list[Path]:  # noqa: ANN401
    """The folders in which `ModelCheckpoint` would have put the checkpoints of these settings."""
    root = Path(trainer.get("default_root_dir") or ".")
    if logger is False:
        return [root / "checkpoints"]
    settings = logger.get("init_args", {}) if hasattr(logger, "get") else {}
    runs = Path(settings.get("save_dir") or root) / str(settings.get("name") or "lightning_logs")
    version = settings.get("version")
    if version is not None:
        name = version if isinstance(version, str) else f"version_{version}"
        return [runs / name / "checkpoints"]
    return sorted(runs.glob("*/checkpoints"))
