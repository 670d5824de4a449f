"""Makes objects from the stored settings of a run, of trusted classes alone; without Lightning."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from ant_lightning.cli.own_defaults import with_own_defaults
from ant_lightning.cli.setting_paths import SettingPaths
from ant_lightning.errors import ConfigError
from ant_lightning.runtime.changed_settings import TRUSTED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# The option of the commands that load a run.
TRUST: dict[str, Any] = {
    "type": str | list[str],
    "default": [],
    "help": "other packages, modules or classes that the run's settings may name",
}


def make_part(
    chosen: dict[str, Any], kind: type, trust: str | Sequence[str] = (), *, name: str = "model"
) -> Any:  # noqa: ANN401
    """Make the object that a part of stored settings describes, `{class_path, init_args}`.

    `name` is that of the setting, for messages.

    Raises:
        ConfigError: If the settings name code that is not trusted, or cannot be made into one.
    """
    trust = (trust,) if isinstance(trust, str) else trust
    _check_trusted(chosen, trust)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, name, required=True)

    def parse() -> Any:  # noqa: ANN401
        parsed = parser.parse_object({name: with_own_defaults(chosen)})
        _check_trusted(parsed.as_dict(), trust)  # the parser has expanded short names
        return parsed

    with SettingPaths() as paths:
        return paths.make(parser, parse)[name]


def _check_trusted(settings: object, trust: Sequence[str]) -> None:
    """Refuse settings that name code from an untrusted package, before it is imported."""
    for name in _imports(settings):
        if not any(name == each or name.startswith(f"{each}.") for each in (*TRUSTED, *trust)):
            raise ConfigError(
                f"trust: the settings name {name}, which is not in {', '.join(TRUSTED)}; if you "
                f"trust that code, set trust to {name.rpartition('.')[0]!r}"
            )


def _imports(value: object) -> Iterator[str]:
    """Every string that is or may be the name of a class.

    The parser accepts a bare import path in place of `class_path`, so every dotted text counts.
    """
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "class_path" and isinstance(each, str) and "." in each:
                yield each
            else:
                yield from _imports(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _imports(each)
    elif isinstance(value, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", value):
        # `find_spec` of a top-level name imports nothing; `weights.pt` names no package.
        yield from [value] if find_spec(value.partition(".")[0]) else []
