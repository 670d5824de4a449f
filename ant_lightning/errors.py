"""The error classes of the package; the command line turns them into one line and exit code 2."""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping


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
    # `not >=` rather than `<`, which is false for NaN; here and below.
    _check(f"at least {minimum}", lambda value: value >= minimum, values)


def check_whole(minimum: int, **values: int | None) -> None:
    """Check that each number is a whole one and at least `minimum`; `None` passes.

    Raises:
        ConfigError: If one is not.
    """
    _check("a whole number", lambda value: index(value) == value, values)
    check_at_least(minimum, **values)


def check_above(bound: float, **values: float | None) -> None:
    """Check that each number is above `bound`; `None` passes.

    Raises:
        ConfigError: If one is not, or NaN.
    """
    _check(f"above {bound}", lambda value: value > bound, values)


def check_finite(minimum: float, **values: float | None) -> None:
    """Check that each number is at least `minimum` and finite; `None` passes.

    Raises:
        ConfigError: If one is not.
    """
    _check(f"at least {minimum} and finite", lambda value: minimum <= value < math.inf, values)


def check_positive(**values: float | None) -> None:
    """Check that each number is above 0 and finite; `None` passes.

    Raises:
        ConfigError: If one is not.
    """
    _check("above 0 and finite", lambda value: 0 < value < math.inf, values)


def check_range(low: float, high: float, **values: float | None) -> None:
    """Check that each number is in `[low, high]`; `None` passes.

    Raises:
        ConfigError: If one is not, or NaN.
    """
    _check(f"from {low} to {high}", lambda value: low <= value <= high, values)


def check_between(low: float, high: float, **values: float | None) -> None:
    """Check that each number is above `low` and below `high`; `None` passes.

    Raises:
        ConfigError: If one is not, or NaN.
    """
    _check(f"above {low} and below {high}", lambda value: low < value < high, values)


def check_one_of(choices: Collection[str | None], **values: str | None) -> None:
    """Check that each value is one of the choices.

    Raises:
        ConfigError: If one is not.
    """
    rule = f"one of {', '.join(map(str, choices))}"
    _check(rule, lambda value: value in choices, values, optional=False)


def check_instance(kind: type, example: str, **values: object) -> None:
    """Check that each value is an object of the class `kind`, not the class itself or a name.

    Args:
        kind: The class.
        example: What a user may write.
        **values: Values by the names of their arguments.

    Raises:
        ConfigError: If one is not.

    >>> from ant_lightning import Clustering, ConfigError, Tasks
    >>> try:
    ...     Tasks("snr")
    ... except ConfigError as error:
    ...     print(error)
    clustering: must be a Clustering, such as SNRClustering(num_tasks=5), found 'snr'
    """
    for name, value in values.items():
        if not isinstance(value, kind):
            found = f"the class {value.__name__}" if isinstance(value, type) else f"{value!r}"
            if len(found) > 60 or "\n" in found:
                found = f"a {type(value).__name__}"
            raise ConfigError(
                f"{name}: must be {_article(kind.__name__)} {kind.__name__}, such as {example}, "
                f"found {found}"
            )


def _article(noun: str) -> str:
    return "an" if noun[0] in "AEIOU" else "a"


def _check(
    rule: str, holds: Callable[[Any], bool], values: Mapping[str, Any], *, optional: bool = True
) -> None:
    for name, value in values.items():
        if optional and value is None:
            continue
        try:
            fits = holds(value)
        except TypeError:  # a text, say, which cannot be compared
            raise ConfigError(f"{name}: must be {rule}, found {value!r}") from None
        if not fits:
            raise ConfigError(f"{name}: must be {rule}, found {value}")


@contextmanager
def extra_for(setting: str, extra: str) -> Iterator[None]:
    """Inside, an import that fails is the error of a setting that needs an optional package.

    Args:
        setting: Path of the setting.
        extra: The extra of this package that installs what is missing.

    Raises:
        ConfigError: If an import fails.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{setting}: needs pip install 'ant-lightning[{extra}]', found {error}"
        ) from error


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

    >>> from ant_lightning.errors import found_at
    >>> found_at("/nope")
    'found nothing at /nope'
    """
    path = Path(path)
    kind = "the folder" if path.is_dir() else "the file" if path.exists() else "nothing at"
    return f"found {kind} {path}"
