"""Which folder a command works in, and which checkpoint `--ckpt_path last` means.

Every run has its own folder, `<save_dir>/<name>/<version>`, with any logger or none. It holds the
checkpoints, the settings (`config.yaml`), pictures and tables.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_warn

from ant_lightning.cli.config_files import load_yaml
from ant_lightning.cli.renamed import with_new_names
from ant_lightning.errors import ConfigError
from ant_lightning.runtime.checkpoint_files import furthest_whole
from ant_lightning.runtime.run_record import RUN_MARK, logger_versions, newest_record
from ant_lightning.runtime.settings import changed_settings

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
    content: Mapping[str, Any] | None = None,
) -> RunFolder | None:
    """Choose the folder, and set loggers, checkpoints and `ckpt_path` in `config` accordingly.

    - `ckpt_path: last` is replaced by the checkpoint with the most steps in this run's own folder:
      the folder of the logger's `version` or, without one, any version with the same settings. If
      there is no checkpoint, `fit` starts from the beginning, because a cluster's scheduler repeats
      the same command for every start.
    - Other commands work in the run folder of their checkpoint, and a run that `last` resumes stays
      in its own, also with a `checkpoint.dirpath` elsewhere.
    - A `fit` that does not resume gets a new folder; `fast_dev_run` gets none.

    Args:
        config: The parser's namespace of the command.
        command: The name of the command.
        settings: The configuration as plain values.
        content: What the checkpoint holds that `ckpt_path` names, if it names one.

    Raises:
        ConfigError: If `last` finds only runs with other settings, or no checkpoint (for commands
            that need one), or a new run would write into another run's folder.
    """
    place = _Place.of(config)
    dirpath = config.checkpoint.get("dirpath")
    is_last = config.ckpt_path == "last"
    if is_last:
        folders = [Path(dirpath)] if dirpath else [each / "checkpoints" for each in place.runs()]
        found = _last(folders or [place.root], settings, needed=command != "fit")
        path, content = found or (None, None)
        config.ckpt_path = path and str(path)
    own = _run_of(Path(config.ckpt_path), content) if content is not None else None
    if config.trainer.get("fast_dev_run"):
        return None
    if command == "fit" and not is_last:
        _check_free(place, dirpath, own, config.ckpt_path)
        own = None  # a run with changed settings is another run
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
    """The settings of the run that wrote a checkpoint, in today's names; `None` if unknown.

    Runs of version 0.1 store them only in the `config.yaml` of their folder.
    """
    saved = checkpoint.get("ant_lightning")
    found = saved.get("settings") if isinstance(saved, dict) else None
    record = newest_record(path.parent.parent)
    if not isinstance(found, dict) and record is not None:
        with suppress(OSError, ValueError, yaml.YAMLError):
            found = load_yaml(record.read_text(encoding="utf8"))
    is_run = isinstance(found, dict) and isinstance(found.get("model"), dict)
    return with_new_names(found) if is_run else None


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
    roots: list[Path]  # of all file loggers without a version; the first is the run's
    version: str | None

    @classmethod
    def of(cls, config: Any) -> _Place:  # noqa: ANN401
        trainer = config.trainer
        default = Path(trainer.get("default_root_dir") or ".")
        if trainer.get("logger") in (None, True):  # the logger that Lightning would create
            job = SLURMEnvironment.job_id() if SLURMEnvironment.detect() else None
            init = Namespace(save_dir=str(default), name=_DEFAULT_NAME, version=job)
            trainer.logger = Namespace(class_path=_DEFAULT_LOGGER, init_args=init)
        given = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        loggers = [each for each in given if hasattr(each, "class_path")]
        loggers.sort(key=_writes_files, reverse=True)  # the first decides
        if not loggers:
            return cls([], [default / _DEFAULT_NAME], None)
        free = [each for each in loggers if _writes_files(each) and _version(each) is None]
        roots = [_root(each, default) for each in (loggers[0], *free)]
        return cls(loggers, list(dict.fromkeys(roots)), _version(loggers[0]))

    @property
    def root(self) -> Path:
        """The folder of the run's folder."""
        return self.roots[0]

    def runs(self) -> list[Path]:
        """The folders that may belong to this run."""
        if self.version is not None:
            return [self.root / self.version]
        return [each.parent for each in sorted(self.root.glob("*/checkpoints"))]

    def reserve(self) -> Path:
        """Create the next free `version_N`; runs that start at once get different folders.

        It is free for every logger that is going to write into a folder of that name.
        """
        names = [path.name for root in self.roots for path in root.glob("version_*")]
        taken = [int(name[8:]) for name in names if name[8:].isdecimal()]
        number = max(taken, default=-1) + 1
        node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
        is_first_rank = not getattr(rank_zero_only, "rank", None) and node == "0"
        while True:
            folder = self.root / f"version_{number}"
            if not is_first_rank:  # `RunRecord` broadcasts the first rank's folder later
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
            module, _, kind = str(logger.class_path).rpartition(".")
            if _version(logger) is not None:
                continue
            logger.init_args = init = _init(logger)
            if _writes_files(logger):
                init.version = folder.name
                if folder.parent != self.root:
                    init.save_dir, init.name = str(folder.parent), ""
            elif kind in versions:  # a service: with this argument it continues an earlier run
                known = inspect.signature(getattr(import_module(module), kind)).parameters
                init[next(each for each in _VERSIONS if each in known)] = versions[kind]


def _last(
    folders: list[Path], settings: Mapping[str, Any], *, needed: bool
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint with the most steps among those of these settings, and its content."""
    others: list[tuple[dict[str, tuple[Any, Any]], Path]] = []

    def has_same_settings(path: Path, content: Mapping[str, Any]) -> bool:
        stored = stored_settings(content, path)
        changed = {} if stored is None else changed_settings(stored, settings)
        if changed:
            others.append((changed, path))
        return not changed

    paths = [path for folder in folders for path in folder.glob("*.ckpt")]
    found = furthest_whole(paths, accept=has_same_settings)
    if found is not None:
        return found
    if others:
        changed, path = min(others, key=lambda each: len(each[0]))
        name, pair = next(iter(changed.items()))
        then, now = pair
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


def _check_free(
    place: _Place, dirpath: str | None, resumed: Path | None, checkpoint: str | None
) -> None:
    """Refuse to start a run in the folder of another, or where another keeps its checkpoints."""
    inside = {path.resolve() for path in (resumed, checkpoint and Path(checkpoint).parent) if path}
    version = None if place.version is None else place.root / place.version
    beside = Path(dirpath) if dirpath and "://" not in str(dirpath) else None
    for setting, folder, patterns in (
        ("trainer.logger.version", version, ("*.ckpt", "checkpoints/*.ckpt", RUN_MARK)),
        ("checkpoint.dirpath", beside, ("*.ckpt", "checkpoints/*.ckpt")),
    ):
        files = [each for pattern in patterns if folder for each in folder.glob(pattern)]
        if folder and files and folder.resolve() not in inside:
            raise ConfigError(
                f"{setting}: must be free for a new run, found {min(files)}; resume that run with "
                f"--ckpt_path last, or choose another {setting.rpartition('.')[-1]}"
            )


def _run_of(checkpoint: Path, content: Mapping[str, Any]) -> Path | None:
    """The folder of the run that wrote a checkpoint, if it is still there.

    It must hold what only runs write: a folder called `checkpoints` may lie anywhere.
    """
    saved = content.get("ant_lightning")
    stored = saved.get("run_folder") if isinstance(saved, dict) else None
    if isinstance(stored, str):  # as seen from the checkpoint: a run may have been moved
        folder = Path(os.path.normpath(checkpoint.absolute().parent / stored))
        return _shortened(folder) if (folder / RUN_MARK).is_file() else None
    folder = checkpoint.absolute().parent.parent  # of version 0.1
    logs = any(next(folder.glob(each), None) for each in ("events.out.tfevents*", "metrics.csv"))
    is_run = checkpoint.absolute().parent.name == "checkpoints" and logs
    return _shortened(folder) if is_run and newest_record(folder) else None


def _shortened(folder: Path) -> Path:
    """Relative to the working folder if it lies below, as settings name it."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _writes_files(logger: Any) -> bool:  # noqa: ANN401
    return str(logger.class_path).endswith(_FILE_LOGGERS)


def _init(logger: Any) -> Any:  # noqa: ANN401
    return logger.get("init_args") or Namespace()


def _root(logger: Any, default: Path) -> Path:  # noqa: ANN401
    """Where a logger puts its versions; for one without folders, where its runs get theirs."""
    init, files = _init(logger), _writes_files(logger)
    names = ("name",) if files else _NAMES
    unnamed = "" if files and "name" in init else _DEFAULT_NAME
    name = next((init.get(each) for each in names if init.get(each)), unnamed)
    return Path(init.get("save_dir") or default) / name


def _version(logger: Any) -> str | None:  # noqa: ANN401
    init = _init(logger)
    value = next((init.get(name) for name in _VERSIONS if init.get(name) is not None), None)
    return value if value is None or isinstance(value, str) else f"version_{value}"
