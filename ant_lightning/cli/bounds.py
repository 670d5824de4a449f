"""Bounds of numbers among the settings, and choices, read from the source of their classes."""

from __future__ import annotations

import ast
from functools import cache
from typing import TYPE_CHECKING, Any

from ant_lightning import errors
from ant_lightning.cli.source_names import choices_of, class_of, method_of, numbers_of
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

_CHECKS = frozenset(
    f"check_{kind}"
    for kind in ("above", "at_least", "between", "finite", "positive", "range", "whole")
)
_Checks = tuple[tuple[str, tuple[float, ...]], ...]


def check_bounds(places: Iterable[tuple[str, str, object]]) -> None:
    """Check the numbers that the constructors of our classes check, and words against choices.

    Args:
        places: Setting, class and inner settings of each class.

    Raises:
        ConfigError: If one is out of bounds, as the constructor says it.
    """
    for setting, kind, given in places:
        name = kind.removeprefix("ant_lightning.")
        if not isinstance(given, dict) or not name.isidentifier():  # a class of others
            continue
        for argument, choices in choices_of(name).items():
            found = given.get(argument)
            if isinstance(found, str) and found not in choices:
                shown = ", ".join(map(repr, choices))  # as the parser says it
                raise ConfigError(f"{setting}.{argument}: must be one of {shown}, found {found}")
        for argument, checks in checks_of(name).items():
            value: Any = given.get(argument)
            if type(value) not in (int, float):  # the parser says what it must be
                continue
            as_parsed = float(value) if numbers_of(name).get(argument) == "a number" else value
            for check, bounds in checks:
                try:
                    getattr(errors, check)(*bounds, **{argument: as_parsed})
                except ConfigError as error:
                    raise ConfigError(f"{setting}.{error}") from error


@cache
def checks_of(name: str) -> dict[str, _Checks]:
    """The checks of `ant_lightning.errors` that the constructors of a class make of an argument.

    Those that depend on a condition, or on another argument, are left out.

    Returns:
        For each argument the name of each check and its bounds: `check_at_least(1, lr=lr)` is
        `{"lr": (("check_at_least", (1,)),)}`.
    """
    found = class_of(name)
    if found is None:
        return {}
    made = [method_of(found, each) for each in ("__init__", "__post_init__")]
    lines = [line for method in made if method for line in method.body]
    calls = [each.value for each in lines if isinstance(each, ast.Expr)]
    checks: dict[str, _Checks] = {}
    for base in found.bases:
        inherited = checks_of(ast.unparse(base).rpartition(".")[-1])
        handed = {n for call in calls if isinstance(call, ast.Call) for n in _handed_on(call)}
        checks |= {n: own for n, own in inherited.items() if n in handed or not made[0]}
    for call in calls:
        if not isinstance(call, ast.Call) or ast.unparse(call.func) not in _CHECKS:
            continue
        if all(isinstance(bound, ast.Constant) for bound in call.args):
            bounds = tuple(ast.literal_eval(bound) for bound in call.args)
            for each in call.keywords:
                if each.arg and ast.unparse(each.value).removeprefix("self.") == each.arg:
                    own = (ast.unparse(call.func), bounds)
                    checks[each.arg] = (*checks.get(each.arg, ()), own)
    return checks


def _handed_on(call: ast.Call) -> list[str]:
    """The arguments that a call of the base's constructor hands on as they are."""
    if ast.unparse(call.func) != "super().__init__":
        return []
    given = [(each.arg, each.value) for each in call.keywords]
    given += [(ast.unparse(each), each) for each in call.args]
    return [name for name, value in given if name and ast.unparse(value) == name]
