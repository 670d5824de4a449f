"""The parser's nested messages as one line: the setting, the rule, the value found."""

from __future__ import annotations

import re
from difflib import get_close_matches
from importlib import import_module

__all__ = ["one_line"]

_PACKAGES = ("backbones", "balancing", "callbacks", "clustering", "data", "diffusion", "metrics")


def one_line(message: str) -> str:
    """What a parser's message says to a user.

    jsonargparse reports every alternative of every nested type; a mistake is in the innermost one.
    A message of another form is returned with its lines joined.
    """
    text = " ".join(message.split())
    setting = ".".join(_settings(text))
    option = re.search(r"class_path '([\w.]+)': Option '([\w.]+)' is not accepted", text)
    if option:
        owner, name = option.groups()
        hint = _suggestion(name.rsplit(".", maxsplit=1)[-1], _parameters(owner))
        return f"{setting}.{name}: {owner.rsplit('.', maxsplit=1)[-1]} has no such option{hint}"
    unknown = re.search(r"Expected a dot import path string: (\S+)", text)
    if unknown:
        known = [name for package in _PACKAGES for name in _names(package)]
        found = unknown.group(1)
        return f"{setting}: no class is called {found!r}{_suggestion(found, known)}"
    missing = re.search(
        r"class_path '([\w.]+)': the following arguments are required: ([\w., ]+?) - ", text
    )
    if missing:
        owner, names = missing.groups()
        return f"{setting}: {owner.rsplit('.', maxsplit=1)[-1]} needs {names}, found nothing"
    expected = re.findall(r"Expected a (<class '[\w.]+'>|typing\.Literal\[[^\]]*\])", text)
    value = re.search(r"(?:Given value|Got value): (.*?)(?: - |$)", text)
    kinds = [_plain(kind) for kind in expected if "NoneType" not in kind]
    if setting and kinds and value:
        rule = " or ".join(dict.fromkeys(kinds))
        return f"{setting}: must be {rule}, found {value.group(1).strip()}"
    plain = re.fullmatch(r'Parser key "([^"]+)": (.{1,200})', text)
    return f"{plain.group(1)}: {plain.group(2)}" if plain else text


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


def _suggestion(name: str, candidates: list[str]) -> str:
    close = get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _names(package: str) -> list[str]:
    exported: list[str] = import_module(f"ant_lightning.{package}").__all__
    return exported


def _parameters(owner: str) -> list[str]:
    """Names of the constructor arguments of a class, those of its bases included."""
    module, _, name = owner.rpartition(".")
    kinds = getattr(import_module(module), name).__mro__[:-1] if module else ()
    codes = [getattr(kind.__init__, "__code__", None) for kind in kinds]
    return [arg for code in codes if code for arg in code.co_varnames if arg != "self"]
