"""The parser's nested messages as one line: the setting, the rule, the value found."""

from __future__ import annotations

import re
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

import ant_lightning
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "first_config_error",
    "needed",
    "no_such_option",
    "one_line",
    "suggestion",
    "unknown_class",
]


def one_line(message: str) -> str:
    """What a parser's message says to a user.

    jsonargparse reports every alternative of every nested type; a mistake is in the innermost one.
    A message of another form is returned with its lines joined.
    """
    text = " ".join(message.split())
    setting = ".".join(_settings(text))
    rules = (_unknown_option, _unknown_class, _missing_argument, _wrong_type, _innermost_rule)
    for rule in rules:
        said = rule(text, setting)
        if said:
            return said
    plain = re.fullmatch(r'Parser key "([^"]+)": (.{1,200})', text)
    return f"{plain.group(1)}: {plain.group(2)}" if plain else text


def first_config_error(error: BaseException) -> ConfigError:
    """Our own error if the parser wrapped one, else the parser's as one of ours."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConfigError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return ConfigError(one_line(str(error)))


def needed(settings: str) -> str:
    """Message for required settings that are not given."""
    return f"{settings}: needed, found nothing; give a --config FILE that sets them"


def no_such_option(unknown: str, options: Iterable[str]) -> str:
    """Message for an unknown option, with the closest known one."""
    name = re.split(r"[=\s]", unknown, maxsplit=1)[0]
    known = ["--model.optimizer", "--model.lr_scheduler", *options]
    close = get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"; did you mean {close[0]}?" if close else "; see --help"
    return f"{unknown}: the command has no such option{hint}"


def unknown_class(setting: str, found: str) -> str:
    """Message for a class that does not exist."""
    return f"{setting}: no class is called {found!r}{_other_class(found)}"


def suggestion(name: str, candidates: Iterable[str]) -> str:
    """A hint with the candidate closest to `name`; empty if none is close."""
    close = get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _unknown_option(text: str, setting: str) -> str | None:
    option = re.search(r"class_path '([\w.]+)': Option '([\w.]+)' is not accepted", text)
    if option is None:
        return None
    owner, name = option.groups()
    hint = suggestion(name.rsplit(".", maxsplit=1)[-1], _parameters(owner))
    return f"{setting}.{name}: {_last(owner)} has no such option{hint}"


def _unknown_class(text: str, setting: str) -> str | None:
    unknown = re.search(
        r"Expected a dot import path string: (\S+)"
        r"|class_path '([\w.]+)': module '[\w.]+' has no",
        text,
    )
    # Where a number may stand as well, that is what was meant.
    if unknown is None or re.search(r"<class '(?:float|int)'>", " ".join(_innermost(text)[0])):
        return None
    found = unknown.group(1) or unknown.group(2)
    return unknown_class(setting, found)


def _missing_argument(text: str, setting: str) -> str | None:
    names = r"the following arguments are required: (?P<names>[\w., ]+?)"
    top = re.fullmatch(names, text)
    if top:
        return needed(re.sub(r"\b(?:fit|validate|test|predict)\.", "", top.group("names")))
    missing = re.search(rf"class_path '(?P<owner>[\w.]+)': {names} - ", text) or re.search(
        rf"a callable class: {names} - .*?class_path='(?P<owner>[\w.]+)'", text
    )
    if missing is None:
        return None
    owner, wanted = missing.group("owner", "names")
    return f"{setting}: {_last(owner)} needs {wanted}, found nothing"


def _wrong_type(text: str, setting: str) -> str | None:
    expected = re.findall(r"Expected a (<class '[\w.]+'>|typing\.Literal\[[^\]]*\])", text)
    kinds = [_plain(kind) for kind in expected if "NoneType" not in kind]
    value = _innermost(text)[1]
    if not (setting and kinds and value):
        return None
    return f"{setting}: must be {' or '.join(dict.fromkeys(kinds))}, found {value}"


def _innermost_rule(text: str, setting: str) -> str | None:
    inner, value = _innermost(text)
    if not inner or not ("Errors:" in text or setting):
        return None
    owner = re.search(r"Given value: Namespace\(class_path='([\w.]+)'", text)
    where = setting or (_last(owner.group(1)) if owner else "settings")
    found = f", found {value}" if value and value not in inner[0] else ""
    return f"{where}: {inner[0][:300]}{found}"


def _last(path: str) -> str:
    return path.rsplit(".", maxsplit=1)[-1]


def _innermost(text: str) -> tuple[list[str], str]:
    """The alternatives of the deepest type that failed, without `null`, and the value found."""
    start = max(text.rfind("Errors:") + len("Errors:"), text.rfind('": ') + 2)
    inner, _, rest = text[start:].partition("Given ")
    items = [item.strip(" -") for item in re.split(r"(?:^| )- ", inner)]
    noise = ("Expected a <class 'NoneType'>", "Expected a <class 'str'>", "Expected a path but")
    kept = [item for item in items if item and not item.startswith(noise)]
    found = re.search(r"value: (.*?)(?:\. Got value: | - |$)", rest) or re.search(
        r"Got value: (.*?)(?: - |$)", text
    )
    value = found.group(1).strip() if found else ""
    nested = re.fullmatch(r"NestedArg\(key='[^']*', val=(.*)\)", value)
    value = nested.group(1).strip("'") if nested else value
    return kept, "" if value.startswith("Namespace(") else value[:100]


def _other_class(found: str) -> str:
    """A class of ours with a similar name; none of exactly this name, which does not fit there."""
    known = ant_lightning.__all__
    name = found.rsplit(".", maxsplit=1)[-1]
    return " that fits here" if name in known else suggestion(name, known)


def _settings(text: str) -> list[str]:
    """The path of nested keys, without the parser's own levels."""
    return [
        key.replace(".init_args", "")
        for key in re.findall(r'Parser key "([^"]+)"', text)
        if key != "config"
    ]


def _plain(kind: str) -> str:
    """A type as a user would say it."""
    if kind.startswith("typing.Literal"):
        return "one of " + kind[len("typing.Literal[") : -1]
    name = kind.removeprefix("<class '").removesuffix("'>")
    return {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(
        name, name.rsplit(".", maxsplit=1)[-1]
    )


def _parameters(owner: str) -> list[str]:
    """Names of the constructor arguments of a class, those of its bases included."""
    module, _, name = owner.rpartition(".")
    kinds = getattr(import_module(module), name).__mro__[:-1] if module else ()
    codes = [getattr(kind.__init__, "__code__", None) for kind in kinds]
    return [arg for code in codes if code for arg in code.co_varnames if arg != "self"]
