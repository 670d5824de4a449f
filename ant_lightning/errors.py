"""The error classes of the package; the command line turns them into one line and exit code 2."""

import re

__all__ = [
    "CheckpointWriteError",
    "ConfigError",
    "DataLoadingError",
    "DivergedRanksError",
    "FileError",
    "NonFiniteError",
    "check_at_least",
    "message_of",
]


class ConfigError(ValueError):
    """A setting breaks a rule; the message names the setting, the rule and the value found."""


class FileError(ConfigError):
    """A file is missing or damaged, or says what cannot be; the message names it and the finding.

    Nothing in the file was executed, and no memory was reserved for what it only claims to hold.
    """


class NonFiniteError(RuntimeError):
    """Training has diverged: a result to be stored or shown has a NaN or an infinity.

    Too many steps in a row had one in a loss or a gradient, or the weights or images have one.
    """


class DivergedRanksError(RuntimeError):
    """Ranks of one run no longer have the same weights, balancer or number of steps."""


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; the message names the file and the reason."""


class DataLoadingError(RuntimeError):
    """A process that loads data has died."""


def check_at_least(minimum: float, **values: float | None) -> None:
    """Check numbers by the names of their arguments; `None` is no number and passes.

    Raises:
        ConfigError: If one is below the minimum, or NaN.
    """
    for name, value in values.items():
        if value is not None and not value >= minimum:
            raise ConfigError(f"{name}: must be at least {minimum}, found {value}")


def message_of(error: BaseException) -> str:
    """The message of an error as one line.

    PyTorch puts the traceback of a process that loads data in front of the message of its error.
    """
    text = str(error)
    name = re.match(r"Caught (\w+) in DataLoader worker", text)
    if name:
        text = text.rpartition(f"{name.group(1)}: ")[2]
    return " ".join(text.split())
