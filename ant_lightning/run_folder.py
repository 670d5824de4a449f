"""Which folder a command works in, and which checkpoint `--ckpt_path last` means.

Every run has its own folder, `<save_dir>/<name>/<version>`, with any logger or none. It holds the
checkpoints, the settings (`config.yaml`), pictures and tables.
"""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_warn

from ant_lightning.callbacks.checkpoint_files import furthest_whole
from ant_lightning.callbacks.run_record import logger_versions, newest_record
from ant_lightning.errors import ConfigError
from ant_lightning.settings import changed_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    import lightning as L

__all__ = ["RunFolder", "check_writable", "choose_run_folder", "stored_settings"]

_FILE_LOGGERS = ("TensorBoardLogger", "CSVLogger")  # one folder per version
_DEFAULT_LOGGER = "lightning.pytorch.loggers.TensorBoardLogger"
_DEFAULT_NAME = "lightning_logs"
_NAMES = ("project", "experiment_name", "name")  # how other loggers name a group of runs
_VERSIONS = ("version", "id", "run_id", "experiment_key")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, and whether it was made for this command."""

    path: Path
    is_new: bool


def choose_run_folder(
    config: Any,  # noqa: ANN401 - the parser's namespace
    command: str,
    settings: Mapping[str, Any],
) -> RunFolder | None:
    """Choose the folder, and set loggers, checkpoints and `ckpt_path` in `config` accordingly.

    - `ckpt_path: last` is replaced by the checkpoint with the most steps in this run's own folder:
      the folder of the logger's `version` or, without one, any version with the same settings. If
      there is no checkpoint, `fit` starts from the beginning, because a cluster's scheduler repeats
      the same command for every start.
    - Other commands work in the run folder of their checkpoint.
    - A `fit` that does not resume gets a new folder; `fast_dev_run` gets none.

    Args:
        config: The parser's namespace of the command.
        command: The name of the command.
        settings: The configuration as plain values.

    Raises:
        ConfigError: If `last` finds only runs with other settings, or no checkpoint (for commands
            that need one), or a new run would write into another run's folder.
    """
    place = _Place.of(config)
    dirpath = config.checkpoint.get("dirpath")
    resumed = None
    if config.ckpt_path == "last":
        folders = [Path(dirpath)] if dirpath else [each / "checkpoints" for each in place.runs()]
        resumed = _last(folders or [place.root], settings, needed=command != "fit")
        config.ckpt_path = None if resumed is None else str(resumed)
    elif command == "fit":
        _check_free(config, place, dirpath)
    elif config.ckpt_path and "://" not in str(config.ckpt_path):
        resumed = Path(config.ckpt_path)
    if config.trainer.get("fast_dev_run"):
        return None
    own = None if resumed is None else _run_of(resumed)
    is_new = False
    if place.version is not None:
        own = place.root / place.version
    elif own is None or not os.access(own, os.W_OK):
        own, is_new = place.reserve(), True
    place.bind(own)
    if command == "fit" and not dirpath:
        config.checkpoint.dirpath = str(own / "checkpoints")
    return RunFolder(own, is_new)


def stored_settings(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """The settings of the run that wrote a checkpoint; None if unknown.

    Runs of version 0.1 store them only in the `config.yaml` of their folder.
    """
    found = (checkpoint.get("ant_lightning") or {}).get("settings")
    if isinstance(found, dict):
        return found
    record = newest_record(path.parent.parent)
    if record is None:
        return None
    try:
        content = yaml.safe_load(record.read_text(encoding="utf8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) and "model" in content else None


def check_writable(trainer: L.Trainer, folders: Mapping[str, str | Path | None]) -> None:
    """Check, before training starts, that logs and checkpoints can be written.

    Raises:
        ConfigError: If a folder is not writable; names the folder and the reason.
    """
    places = [("trainer.logger.save_dir", logger.save_dir) for logger in trainer.loggers]
    for setting, folder in [*places, *folders.items()]:
        if not trainer.is_global_zero or folder is None or "://" in str(folder):
            continue
        existing = Path(folder)
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        try:
            with tempfile.TemporaryFile(dir=existing) as file:
                file.write(b"0")
        except OSError as error:
            raise ConfigError(
                f"{setting}: must be a folder that can be written to, found {folder} "
                f"({error.strerror})"
            ) from error


@dataclass(frozen=True)
class _Place:
    """Where the loggers' settings put runs: `root / version`."""

    loggers: list[Any]
    root: Path
    version: str | None

    @classmethod
    def of(cls, config: Any) -> _Place:  # noqa: ANN401
        trainer = config.trainer
        default = Path(trainer.get("default_root_dir") or ".")
        given = trainer.get("logger")
        if given in (None, True):  # the logger that Lightning would create
            init = Namespace(save_dir=str(default), name=_DEFAULT_NAME, version=_slurm_job())
            trainer.logger = given = Namespace(class_path=_DEFAULT_LOGGER, init_args=init)
        loggers = [each for each in _as_list(given) if hasattr(each, "class_path")]
        primary = next((each for each in loggers if _writes_files(each)), None)
        primary = primary or next(iter(loggers), None)
        if primary is None:
            return cls(loggers, default / _DEFAULT_NAME, None)
        init = primary.get("init_args") or Namespace()
        names = ("name",) if _writes_files(primary) else _NAMES
        name = next((init.get(each) for each in names if init.get(each)), None)
        if name is None and not (_writes_files(primary) and "name" in init):
            name = _DEFAULT_NAME
        root = Path(init.get("save_dir") or default) / (name or "")
        return cls(loggers, root, _version(init))

    def runs(self) -> list[Path]:
        """The folders that may belong to this run."""
        if self.version is not None:
            return [self.root / self.version]
        return [each.parent for each in sorted(self.root.glob("*/checkpoints"))]

    def reserve(self) -> Path:
        """Create the next free `version_N`; runs that start at once get different folders."""
        taken = [re.fullmatch(r"version_(\d+)", path.name) for path in self.root.glob("version_*")]
        number = max((int(match.group(1)) + 1 for match in taken if match), default=0)
        while True:
            folder = self.root / f"version_{number}"
            if not _is_first_rank():  # `RunRecord` broadcasts the first rank's folder later
                return folder
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                number += 1
            except OSError as error:
                raise ConfigError(
                    "trainer.logger.save_dir: must be a folder that can be written to, found "
                    f"{self.root} ({error.strerror})"
                ) from error
            else:
                return folder

    def bind(self, folder: Path) -> None:
        """Make every logger without a version log into `folder`, as the run in it did."""
        versions = logger_versions(folder)
        for logger in self.loggers:
            kind = str(logger.class_path).rpartition(".")[-1]
            if "init_args" not in logger:
                logger.init_args = Namespace()
            init = logger.init_args
            if _version(init) is not None:
                continue
            if _writes_files(logger):
                init.version = folder.name
                if folder.parent != self.root:
                    init.save_dir, init.name = str(folder.parent), ""
            elif kind in versions:
                setattr(init, _version_argument(logger.class_path), versions[kind])


def _last(folders: list[Path], settings: Mapping[str, Any], *, needed: bool) -> Path | None:
    """The checkpoint with the most steps among runs with these settings."""
    found: list[tuple[int, Path]] = []
    others: list[tuple[dict[str, tuple[Any, Any]], Path]] = []
    for folder in folders:
        whole = furthest_whole(folder.glob("*.ckpt"))
        if whole is None:
            continue
        path, content = whole
        stored = stored_settings(content, path)
        changed = {} if stored is None else changed_settings(stored, settings)
        if changed:
            others.append((changed, path))
        else:
            found.append((int(content["global_step"]), path))
    if found:
        return max(found, key=lambda each: each[0])[1]
    if others:
        changed, path = min(others, key=lambda each: len(each[0]))
        name, pair = next(iter(changed.items()))
        then, now = ("null" if each is None else each for each in pair)
        raise ConfigError(
            f"ckpt_path: 'last' must be of a run with the same {name}, found {then} in {path} and "
            f"{now} here; to resume with a changed setting give the path of the checkpoint, to "
            "train a separate run give another trainer.logger.version"
        )
    places = ", ".join(str(folder) for folder in folders)
    if needed:
        raise ConfigError(f"ckpt_path: 'last' needs a checkpoint, found none in {places}")
    rank_zero_warn(
        f"ckpt_path: there is no checkpoint in {places}; training starts from the beginning"
    )
    return None


def _check_free(config: Any, place: _Place, dirpath: str | None) -> None:  # noqa: ANN401
    """Refuse to start a run where another run keeps its checkpoints."""
    if dirpath:
        setting, folder = "checkpoint.dirpath", Path(dirpath)
    elif place.version is not None:
        setting, folder = "trainer.logger.version", place.root / place.version / "checkpoints"
    else:
        return
    if config.trainer.get("fast_dev_run") or "://" in str(folder):
        return
    resumed = config.ckpt_path and Path(config.ckpt_path).resolve().parent == folder.resolve()
    there = next(iter(sorted(folder.glob("*.ckpt"))), None)
    if there is not None and not resumed:
        raise ConfigError(
            f"{setting}: must be free for a new run, found {there}; resume that run with "
            f"--ckpt_path last, or choose another {setting.rpartition('.')[-1]}"
        )


def _run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint, if the checkpoint is in a run folder."""
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else None


def _as_list(value: Any) -> list[Any]:  # noqa: ANN401
    return value if isinstance(value, list) else [value]


def _writes_files(logger: Any) -> bool:  # noqa: ANN401
    return str(logger.class_path).endswith(_FILE_LOGGERS)


def _version(init: Any) -> str | None:  # noqa: ANN401
    value = next((init.get(name) for name in _VERSIONS if init.get(name) is not None), None)
    return value if value is None or isinstance(value, str) else f"version_{value}"


def _version_argument(class_path: str) -> str:
    """The constructor argument with which a logger continues an earlier run of its service."""
    module, _, name = class_path.rpartition(".")
    known = inspect.signature(getattr(import_module(module), name)).parameters
    return next((each for each in _VERSIONS if each in known), "version")


def _slurm_job() -> int | None:
    return SLURMEnvironment.job_id() if SLURMEnvironment.detect() else None


def _is_first_rank() -> bool:
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return (getattr(rank_zero_only, "rank", None) or 0) == 0 and node == "0"
