"""The parser's nested messages as one line: the setting, the rule, the value found."""

from __future__ import annotations

import re
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING

import ant_lightning
from ant_lightning.cli.logger_names import LOGGERS
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "Iterable": "a list",
    "Sequence": "a list",
    "list": "a list",
}
# Ways to name a class, which jsonargparse lists even where a number was meant.
_FORMS_OF_A_CLASS = ("a class path", "a dict with")
_BESIDE_A_CLASS = ("a list", "true or false")  # a name that is given there was meant for a class
# Alternatives that jsonargparse lists for most types, and that users rarely mean.
_NOISE = (
    "Expected a <class 'NoneType'>",
    "Expected <class 'NoneType'>",
    "Expected a <class 'str'>",
    "Expected a path but",
)


def first_config_error(error: BaseException, options: Iterable[str] = ()) -> ConfigError:
    """Our own error if the parser wrapped one, else the parser's message as a `ConfigError`."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConfigError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return ConfigError(one_line(str(error), options))


def one_line(message: str, options: Iterable[str] = ()) -> str:
    """Reduce a message of jsonargparse to one line for the user.

    jsonargparse reports every alternative of every nested type; the mistake is in the innermost
    one. A message of unknown form is returned with its lines joined.

    Args:
        message: The message.
        options: The options of the command, from which the closest is suggested.
    """
    text = re.sub(r'(Parser key "[^"]+") element \d+:', r"\1:", " ".join(message.split()))
    known_options = [each.lstrip("-") for each in options]
    unknown = re.match(r"unrecognized arguments: --([\w.]+)", text)
    if unknown:
        return no_such_setting(unknown[1], known_options)
    text = re.sub(
        r"unrecognized arguments: ([\w.]+).*",
        r"\1: the command has no place for it, as options begin with --",
        text,
    )
    text = re.sub(r"argument --([\w.]+): expected .* argument", r"\1: needs a value", text)
    shown = re.search(r"--([\w.]+)\.help: Expected a dot import path string: (\S+)", text)
    if shown:
        return unknown_class(f"{shown[1]}.help", shown[2])
    # The path of nested keys, without the levels `config` and `init_args`.
    keys = [key for key in re.findall(r'Parser key "([^"]+)"', text) if key != "config"]
    if len(keys) > 1 and keys[1].startswith(f"{keys[0]}."):  # a group that is given as a whole
        del keys[0]
    setting = ".".join(keys).replace(".init_args", "")
    unaccepted = re.search(r"class_path '([\w.]+)\.(\w+)': Option '([\w.]+)' is not accepted", text)
    # A tensor in place of a number is not meant by anyone, and has no signature to suggest from.
    if unaccepted and unaccepted[2] != "Tensor":
        module, owner, name = unaccepted.groups()
        known = signature(getattr(import_module(module), owner)).parameters
        return no_such_setting(f"{setting}.{name}", (f"{setting}.{n}" for n in known), owner)
    missing = re.search(r"arguments are required: ([\w., ]+?)(?: - |$)", text)
    if missing:
        # Top-level settings have the command in front: fit.data.
        names = re.sub(r"\b(?:fit|validate|test|predict)\.", "", missing.group(1))
        if setting or (known_options and "config" not in known_options):
            return f"{setting}{'.' if setting else ''}{names}: needed, found nothing"
        return needed(names)
    return _innermost(text, setting)


def needed(settings: str) -> str:
    """Message for required groups of settings that are not given."""
    return f"{settings}: needed, found nothing; give a --config FILE that sets them"


def no_such_setting(path: str, known: Iterable[str], owner: str = "the command") -> str:
    """Message for a setting that does not exist, with the closest one that does."""
    hint = suggestion(path, known)
    if path.endswith("+"):
        hint = f"; in a config a list replaces, --{path} of the command line adds to it"
    return f"{path}: {owner} has no such setting{hint}"


def suggestion(path: str, candidates: Iterable[str]) -> str:
    """A hint at the candidate whose last name is `path`, else at the closest; empty if none is."""
    known = list(candidates)
    same = [each for each in known if each.rpartition(".")[-1] == path]
    close = same or get_close_matches(path, known, n=1, cutoff=0.7)
    if not close and "." not in path:
        last = {each.rpartition(".")[-1]: each for each in reversed(known)}
        close = [last[each] for each in get_close_matches(path, last, n=1, cutoff=0.8)]
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown_class(setting: str, found: str) -> str:
    """Message for a class that does not exist, or does not fit where it is named."""
    name = found.rpartition(".")[-1]
    if setting == "trainer.logger":
        names = [*LOGGERS, *(kind for kind, _ in LOGGERS.values())]
        other = suggestion(name, names) or f"; short names are {', '.join(LOGGERS)}"
    elif name in ant_lightning.__all__:
        other = " that fits here"
    else:
        other = suggestion(name, ant_lightning.__all__)
    return f"{setting}: no class is called {found!r}{other}"


def _innermost(text: str, setting: str) -> str:
    """The rule of the deepest type that failed, and the value found."""
    # The alternatives of the last union, or else what follows the last key.
    inner = text[max(text.rfind("Errors:") + len("Errors:"), text.rfind('": ') + 2) :]
    inner, _, rest = inner.partition("Given ")
    items = [item.strip(" -") for item in re.split(r"(?:^| )- ", inner.partition(". Got value")[0])]
    rules = [_rule(item) for item in items if item and not item.startswith(_NOISE)]
    made = re.search(r"Problem with given class_path '(?:[\w.]+\.)?(\w+)': (.*?)(?: - |$)", text)
    if not setting and made:  # a class that could not be made
        return f"{made[1]}: {made[2]}"
    if not setting or not rules:
        return re.sub(r'^Parser key "([^"]+)": ', r"\1: ", text)
    unknown = re.search(
        r"Expected a dot import path string: (\S+)|class_path '([\w.]+)': module '[\w.]+' has no",
        text,
    )
    # If both a number and a class are allowed, a number was probably meant.
    types = [rule for rule in rules if rule.startswith(("a ", "true", "one of"))]
    types = [rule for rule in types if not rule.startswith(_FORMS_OF_A_CLASS)] or types
    if unknown and not set(types).difference(_BESIDE_A_CLASS):
        return unknown_class(setting, unknown.group(1) or unknown.group(2))
    rule = f"must be {' or '.join(dict.fromkeys(types))}" if types else rules[0][:300]
    value = (
        re.search(r"Got value: (.*?)(?: - |\s*$)", inner)
        or re.search(r"value: (.*?)(?:\. Got value: | - |$)", rest)
        or re.search(r"Got value: (.*?)(?: - |$)", text)
    )
    found = value.group(1) if value else ""
    nested = re.fullmatch(r"NestedArg\(key='[^']*', val=(.*)\)", found)
    found = nested.group(1).strip("'") if nested else found
    # A namespace would print the whole object; the rule already says what is wrong in it.
    said = not found or (not types and found in rule) or found.startswith("Namespace(")
    return f"{setting}: {rule}" + ("" if said else f", found {found[:100]}")


def _rule(alternative: str) -> str:
    """An expected type as a user would say it; other rules in the parser's words."""
    choices = re.match(r"Expected a typing\.Literal\[(.*)\]", alternative)
    if choices:
        return f"one of {choices.group(1)}"
    kind = re.match(r"Expected (?:a )?<class '(?:[\w.]+\.)?(\w+)'>", alternative)
    if kind:
        return _TYPES.get(kind.group(1), f"a {kind.group(1)}")
    return re.sub(r"^Expected ", "must be ", alternative)
