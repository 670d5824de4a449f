"""Where the loggers of a command put its runs: folders `<save_dir>/<name>/<version>`."""

from __future__ import annotations

import inspect
import os
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from ant_lightning.errors import ConfigError
from ant_lightning.runtime.run_files import logger_versions

_FILE_LOGGERS = ("TensorBoardLogger", "CSVLogger")  # one folder per version
_DEFAULT_LOGGER = "lightning.pytorch.loggers.TensorBoardLogger"
_DEFAULT_NAME = "lightning_logs"
_NAMES = ("project", "experiment_name", "name")  # how other loggers name a group of runs
_VERSIONS = ("version", "id", "run_id", "experiment_key")  # and one run


@dataclass(frozen=True)
class RunVersions:
    """The folders of all runs whose loggers have the same settings.

    Attributes:
        loggers: Settings of the loggers; the first decides where a run is.
        roots: Parent of the run's folder, then the parents that other file loggers without a
            version use.
        version: Name of the run's folder; `None` if the settings do not give it.
    """

    loggers: list[Any]
    roots: list[Path]
    version: str | None

    @classmethod
    def of(cls, config: Any) -> RunVersions:  # noqa: ANN401
        """From a command's settings; writes Lightning's default logger into them if none is set."""
        trainer = config.trainer
        default = Path(trainer.get("default_root_dir") or ".")
        if trainer.get("logger") in (None, True):
            job = SLURMEnvironment.job_id() if SLURMEnvironment.detect() else None
            init = Namespace(save_dir=str(default), name=_DEFAULT_NAME, version=job)
            trainer.logger = Namespace(class_path=_DEFAULT_LOGGER, init_args=init)
        given = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        loggers = [each for each in given if hasattr(each, "class_path")]
        for each in loggers:
            if str(each.class_path).endswith("MLFlowLogger"):
                _set_mlflow(each, default)
        # Loggers with folders come first, because the first decides where the run is.
        loggers.sort(key=_writes_files, reverse=True)
        if not loggers:
            return cls([], [default / _DEFAULT_NAME], None)
        # All of these will write into a folder `version_N`, so N must be free for each.
        free = [each for each in loggers if _writes_files(each) and _version(each) is None]
        roots = [_root(each, default) for each in (loggers[0], *free)]
        return cls(loggers, list(dict.fromkeys(roots)), _version(loggers[0]))

    @property
    def root(self) -> Path:
        """Parent of the run's folder."""
        return self.roots[0]

    def runs(self) -> list[Path]:
        """Folders that may be this run's: the one of its version, or all with checkpoints."""
        if self.version is not None:
            return [self.root / self.version]
        return [each.parent for each in sorted(self.root.glob("*/checkpoints"))]

    def reserve(self) -> Path:
        """Create the next free `version_N`; runs that start together get different folders.

        N is free for every logger that will write into a folder of that name.
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
            try:  # mkdir is atomic: of two runs that start together, one gets the next number
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
            if kind == "WandbLogger":
                _set_wandb(logger, folder)
            if kind == "MLFlowLogger" and not _init(logger).get("run_name"):
                logger.init_args.run_name = folder.name
            if _version(logger) is not None:
                continue
            logger.init_args = init = _init(logger)
            if _writes_files(logger):
                init.version = folder.name
                # A resumed run stays in its folder, even if save_dir or name has changed.
                if folder.parent != self.root:
                    init.save_dir, init.name = str(folder.parent), ""
            elif kind in versions:  # a service: with this argument it continues an earlier run
                known = inspect.signature(getattr(import_module(module), kind)).parameters
                init[next(each for each in _VERSIONS if each in known)] = versions[kind]


def _writes_files(logger: Any) -> bool:  # noqa: ANN401
    return str(logger.class_path).endswith(_FILE_LOGGERS)


def _set_wandb(logger: Any, folder: Path) -> None:  # noqa: ANN401
    """Let W&B add to a run whose id it knows, which it would overwrite; name project and run.

    The first is `WandbLogger`'s own default, but the parser hands it every default of `wandb.init`.
    Without a project the run is called as its folder is: `version_3` of `digits_dit`.
    """
    logger.init_args = init = _init(logger)
    if not (init.get("project") or os.environ.get("WANDB_PROJECT")):
        init.project, init.name = folder.absolute().parent.name, folder.name
    if not any(init.get(name) for name in ("resume", "resume_from", "fork_from")):
        init.resume = "allow"


def _set_mlflow(logger: Any, default: Path) -> None:  # noqa: ANN401
    """Without an address, keep a database and its artifacts in `save_dir`: MLflow refuses files."""
    logger.init_args = init = _init(logger)
    folder = Path(init.get("save_dir") or default).absolute()
    if not (init.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI")):
        init.tracking_uri = f"sqlite:///{folder / 'mlflow.db'}"
        init.artifact_location = init.get("artifact_location") or str(folder / "mlflow_artifacts")
        with suppress(OSError):  # the checks of the folder say it
            folder.mkdir(parents=True, exist_ok=True)


def _init(logger: Any) -> Any:  # noqa: ANN401
    return logger.get("init_args") or Namespace()


def _root(logger: Any, default: Path) -> Path:  # noqa: ANN401
    """Parent of a logger's version folders, or of our run folders if it has none itself."""
    init, files = _init(logger), _writes_files(logger)
    names = ("name",) if files else _NAMES
    unnamed = "" if files and "name" in init else _DEFAULT_NAME
    name = next((init.get(each) for each in names if init.get(each)), unnamed)
    return Path(init.get("save_dir") or default) / name


def _version(logger: Any) -> str | None:  # noqa: ANN401
    init = _init(logger)
    value = next((init.get(name) for name in _VERSIONS if init.get(name) is not None), None)
    return value if value is None or isinstance(value, str) else f"version_{value}"
