"""Short names of loggers: `wandb` for `WandbLogger`, and lists of them."""

from __future__ import annotations

from typing import Any

# Short name of a logger: its class, and the arguments of this that say where runs are.
LOGGERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tensorboard": ("TensorBoardLogger", ("save_dir", "name")),
    "wandb": ("WandbLogger", ("save_dir", "name")),
    "mlflow": ("MLFlowLogger", ("save_dir",)),
    "csv": ("CSVLogger", ("save_dir", "name")),
    "comet": ("CometLogger", ()),
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
    return any(logger == kind for kind, _ in LOGGERS.values())


def places_of(kind: str) -> set[str]:
    """The arguments of a logger that say where runs are; none of other classes."""
    return {name for each, names in LOGGERS.values() if each == kind for name in names}


def placed_logger(kind: str, before: list[Any]) -> dict[str, Any]:
    """The settings of a logger whose runs lie where those of the first of `before` do."""
    first = before[0] if before and isinstance(before[0], dict) else {}
    given = first.get("init_args") or {}
    init = {name: given[name] for name in sorted(places_of(kind)) if name in given}
    return {"class_path": kind, "init_args": init}
