"""The error classes of the package; the command line turns them into one line and exit code 2."""

import re
from pathlib import Path

__all__ = [
    "CheckpointWriteError",
    "ConfigError",
    "DataLoadingError",
    "DivergedRanksError",
    "FileError",
    "NonFiniteError",
    "UnsupportedError",
    "check_at_least",
    "found_at",
    "message_of",
]


class ConfigError(ValueError):
    """A setting breaks a rule; the message names the argument, the rule and the value found.

    Examples:
        >>> try:
        ...     PCGrad(num_tasks=0)
        ... except ConfigError as error:
        ...     print(error)
        num_tasks: must be at least 1, found 0
    """


class FileError(ConfigError):
    """A file is missing, damaged or impossible; the message begins with its path.

    Nothing in the file was executed, and no memory was reserved before its size was checked.
    """


class UnsupportedError(ConfigError):
    """An engine cannot separate the gradients of the tasks in this network."""


class NonFiniteError(RuntimeError):
    """Training has diverged: losses, gradients, weights or images have a NaN or an infinity."""


class DivergedRanksError(RuntimeError):
    """Ranks of one run no longer have the same weights, balancer or number of steps."""


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; the message names the file and the reason."""


class DataLoadingError(RuntimeError):
    """A data loading process has died."""


def check_at_least(minimum: float, **values: float | None) -> None:
    """Check that each number is at least `minimum`; `None` passes.

    Args:
        minimum: Smallest value that is allowed.
        **values: Numbers by the names of their arguments.

    Raises:
        ConfigError: If one is below the minimum, or NaN.
    """
    for name, value in values.items():
        # `not >=` rather than `<`, which is false for NaN.
        if value is not None and not value >= minimum:
            raise ConfigError(f"{name}: must be at least {minimum}, found {value}")


def message_of(error: BaseException) -> str:
    """The message of an error as one line.

    PyTorch puts the traceback of a data loading process in front of the error's message; only what
    follows the name of the error at its end is kept.
    """
    text = str(error)
    name = re.match(r"Caught (\w+) in DataLoader worker", text)
    if name:
        text = text.rpartition(f"{name.group(1)}: ")[2]
    return " ".join(text.split())


def found_at(path: str | Path) -> str:
    """What is at a path that a setting names, for messages.

    >>> found_at("/nope")
    'found nothing at /nope'
    """
    path = Path(path)
    kind = "the folder" if path.is_dir() else "the file" if path.exists() else "nothing at"
    return f"found {kind} {path}"
