"""The settings of a command line, merged from its files and options without parsing them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ant_lightning
from ant_lightning.cli.config_files import FLAGS, load_yaml
from ant_lightning.cli.configs import config_names
from ant_lightning.cli.logger_names import places_of
from ant_lightning.cli.source_names import arguments_of
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


def merged_settings(args: Sequence[str]) -> dict[str, Any] | None:
    """What `--config` files and options say, with later ones first, as the parser merges them.

    `init_args` are moved up beside their `class_path`. Only the value that counts in the end is
    kept.

    Args:
        args: The arguments of a command, without its name.

    Returns:
        The settings; `None` if the command line has a form that only the parser understands.
    """
    options = _options([each for each in args if each not in FLAGS])
    if options is None:
        return None
    settings: dict[str, Any] = {}
    for name, value in options:
        if name in {"config", "c"}:
            # Settings given inline may be longer than a path can be.
            is_file = not value.lstrip().startswith("{") and Path(value).is_file()
            merge(settings, loaded(Path(value).read_text(encoding="utf8") if is_file else value))
        else:
            merge(settings, _nested(name, value))
    return settings


def _options(args: Sequence[str]) -> list[tuple[str, str]] | None:
    """Name and value of each option; `None` if the command line has any other form."""
    found, rest = [], list(args)
    while rest:
        name, sign, value = rest.pop(0).partition("=")
        if not re.fullmatch(r"--[A-Za-z]\w*(\.\w+)*\+?|-c", name) or name.endswith(".help"):
            return None
        if not sign:
            if not rest or rest[0].startswith("--"):
                return None
            value = rest.pop(0)
        found.append((name.lstrip("-"), value))
    return found


def check_form(args: Sequence[str]) -> None:
    """Check that every argument is an option with a value.

    Raises:
        ConfigError: Naming the first that is not.
    """
    rest = list(args)
    while rest:
        name, sign, _ = rest.pop(0).partition("=")
        if not name.startswith("-"):
            meant = f"; did you mean --config {name}?" if name in config_names() else ""
            raise ConfigError(
                f"{name}: the command has no place for it, as options begin with --{meant}"
            )
        if name.endswith(".help"):  # of a class, which may be named
            return
        if not sign and (not rest or rest[0].startswith("--")):
            raise ConfigError(f"{name.lstrip('-')}: needs a value, found none")
        del rest[: not sign]


def appended(args: Sequence[str]) -> list[tuple[str, Any]]:
    """Name and value of each option that adds to a list, such as `--trainer.callbacks+ EMA`."""
    options = _options([each for each in args if each not in FLAGS]) or []
    return [(name[:-1], loaded(value)) for name, value in options if name.endswith("+")]


def loaded(text: str) -> Any:  # noqa: ANN401 - whatever it holds
    """The value of an option, or a config given in place of a file."""
    try:
        return load_yaml(text)
    except Exception:  # not YAML: the parser decides whether a string is valid here
        return text


def _nested(name: str, value: str) -> dict[str, Any]:
    """An option as a nested config; a `+` option becomes an opaque value that no check inspects."""
    inner: Any = object() if name.endswith("+") else loaded(value)
    for part in reversed(name.removesuffix("+").split(".")):
        inner = {part: inner}
    return inner  # type: ignore[no-any-return]


def _arguments(class_path: object) -> set[str]:
    """The arguments of a class of ours; of other classes, which are not imported here, few."""
    name = str(class_path).removeprefix("ant_lightning.")
    if name not in ant_lightning.__all__:
        return set(places_of(name))
    found = arguments_of(name)
    if found is not None:
        return set(found)
    return set(inspect.signature(getattr(ant_lightning, name)).parameters)


def _merged_class(before: Any, given: Any) -> Any:  # noqa: ANN401
    """An element of a list that takes the place of a class."""
    if not isinstance(given, str | dict):
        return given
    found = dict(before)
    merge(found, {"class_path": given} if isinstance(given, str) else given)
    return found


def merge(into: dict[str, Any], settings: Any) -> None:  # noqa: ANN401
    """Merge settings, later ones first; `init_args` are moved up beside their `class_path`."""
    if not isinstance(settings, dict):
        return
    for name, given in settings.items():
        if name == "init_args":
            merge(into, given)
            continue
        before = into.get(name)
        if name == "class_path" and before not in (None, given):
            # Another class: like the parser, keep those old settings that still fit.
            for other in set(into) - _arguments(given):
                del into[other]
        is_class = isinstance(before, dict) and "class_path" in before
        value = {"class_path": given} if is_class and isinstance(given, str) else given
        if is_class and isinstance(given, list):  # each keeps what fits, too
            value = [_merged_class(before, each) for each in given]
        if isinstance(before, list) and isinstance(value, dict) and "class_path" not in value:
            last: dict[str, Any] = {}  # to which the parser gives them
            for each in (*before[-1:], value):
                merge(last, {"class_path": each} if isinstance(each, str) else each)
            into[name] = [*before[:-1], last]
            continue
        if isinstance(value, dict):
            if not isinstance(before, dict):
                into[name] = before = {"class_path": before} if isinstance(before, str) else {}
            merge(before, value)
        else:
            into[name] = value
