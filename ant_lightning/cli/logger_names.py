"""Short names of loggers: `wandb` for `WandbLogger`, and lists of them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

# Short name of a logger: its class, and the arguments of this that say where runs are, with the
# names that most loggers have for them.
_FOLDER = {"save_dir": "save_dir", "name": "name"}
LOGGERS: dict[str, tuple[str, dict[str, str]]] = {
    "tensorboard": ("TensorBoardLogger", _FOLDER),
    "wandb": ("WandbLogger", _FOLDER),
    "mlflow": ("MLFlowLogger", {"save_dir": "save_dir", "experiment_name": "name"}),
    "csv": ("CSVLogger", _FOLDER),
    "comet": ("CometLogger", {}),
}
# The package that a logger needs, and what to install for it.
_PACKAGES = {
    "WandbLogger": ("wandb", "'ant-lightning[wandb]'"),
    "MLFlowLogger": ("mlflow", "'ant-lightning[mlflow]'"),
    "CometLogger": ("comet_ml", "comet_ml"),
}


def with_logger_classes(logger: Any) -> Any:  # noqa: ANN401 - whatever YAML holds
    """A value of `trainer.logger`, one or a list, with classes in place of short names in any case.

    >>> from ant_lightning.cli.logger_names import with_logger_classes
    >>> with_logger_classes(["csv", {"class_path": "wandb"}, "mine.Logger"])
    ['CSVLogger', {'class_path': 'WandbLogger'}, 'mine.Logger']
    """
    if isinstance(logger, list):
        return [with_logger_classes(each) for each in logger]
    if isinstance(logger, dict) and "class_path" in logger:
        return {**logger, "class_path": with_logger_classes(logger["class_path"])}
    if not isinstance(logger, str):
        return logger
    return LOGGERS.get(logger.lower().removesuffix("logger"), (logger,))[0]


def is_known_logger(logger: object) -> bool:
    """Whether this is the name of a class that has a short name."""
    return any(_short(logger) == kind for kind, _ in LOGGERS.values())


def missing_package(logger: object) -> str | None:
    """What to install for a logger whose package is not here; `None` if nothing is missing."""
    package, install = _PACKAGES.get(_short(logger), ("", ""))
    return install if package and find_spec(package) is None else None


def places_of(kind: object) -> dict[str, str]:
    """The arguments of a logger that say where runs are, with their common names; else none."""
    return next((names for each, names in LOGGERS.values() if each == _short(kind)), {})


def placed_loggers(loggers: list[Any]) -> list[Any]:
    """Loggers without a `save_dir` get the place of the one before, and the first gets `runs`.

    >>> from ant_lightning.cli.logger_names import placed_loggers
    >>> placed_loggers(["CSVLogger"])
    [{'class_path': 'CSVLogger', 'init_args': {'save_dir': 'runs'}}]
    """
    place: dict[str, Any] = {"save_dir": "runs"}
    found = []
    for each in loggers:
        logger = {"class_path": each} if isinstance(each, str) and is_known_logger(each) else each
        if isinstance(logger, dict):
            init, names = logger.get("init_args") or {}, places_of(logger.get("class_path"))
            if is_known_logger(logger.get("class_path")) and "save_dir" not in init:
                known = {own: place[name] for own, name in names.items() if name in place}
                logger = {**logger, "init_args": known | init}
            if "save_dir" in init:
                place |= {name: init[own] for own, name in names.items() if own in init}
        found.append(logger)
    return found


def _short(kind: object) -> str:
    return str(kind).removeprefix("lightning.pytorch.loggers.")
