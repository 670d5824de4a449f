"""Names of the arguments of classes, read from source files without importing them."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import ant_lightning

_NUMBERS = {"int": "a whole number", "float": "a number"}
_NONE = re.compile(r" \| None$|^Optional\[|\]$")
_LIGHTNING = {"Trainer": "trainer/trainer.py", "ModelCheckpoint": "callbacks/model_checkpoint.py"}


@cache
def arguments_of(name: str, method: str = "__init__") -> frozenset[str] | None:
    """The arguments that a class takes, or one of its methods.

    Those of the bases count as well where the constructor is inherited or takes `**kwargs`.

    Args:
        name: One of our public classes, or `Trainer` or `ModelCheckpoint` of Lightning.
        method: The method.

    Returns:
        The names; `None` if the source does not tell.
    """
    found = _class_of(name)
    if found is None:
        return None
    made = _method_of(found, method)
    own: frozenset[str] = frozenset()
    if made is not None:
        own = frozenset(each.arg for each in (*made.args.args, *made.args.kwonlyargs)) - {"self"}
        if made.args.kwarg is None:
            return own
    inherited = [arguments_of(ast.unparse(base).rpartition(".")[-1]) for base in found.bases]
    known = [each for each in inherited if each is not None]
    return own.union(*known) if known and len(known) == len(inherited) else None


@cache
def numbers_of(name: str) -> dict[str, str]:
    """The arguments of a class that are one number or `None`, and which kind in words."""
    found = _class_of(name)
    if found is None:
        return {}
    made = _method_of(found, "__init__")
    own = [*made.args.args, *made.args.kwonlyargs] if made else []
    kinds = {a.arg: _NONE.sub("", ast.unparse(a.annotation)) for a in own if a.annotation}
    bases = found.bases if made is None or made.args.kwarg else []
    inherited = [numbers_of(ast.unparse(base).rpartition(".")[-1]) for base in bases]
    numbers = {n: rule for each in inherited for n, rule in each.items() if n not in kinds}
    return numbers | {n: _NUMBERS[kind] for n, kind in kinds.items() if kind in _NUMBERS}


@cache
def needed_arguments_of(name: str) -> tuple[str, ...]:
    """The arguments without a default of the constructor that one of our classes defines."""
    found = _class_of(name)
    made = found and _method_of(found, "__init__")
    if not made:
        return ()
    first = made.args.args[1 : len(made.args.args) - len(made.args.defaults)]  # without self
    others = zip(made.args.kwonlyargs, made.args.kw_defaults, strict=True)
    return (*(each.arg for each in first), *(each.arg for each, value in others if value is None))


def _class_of(name: str) -> ast.ClassDef | None:
    path = _file_of(name)
    nodes = ast.parse(path.read_text(encoding="utf8")).body if path and path.is_file() else []
    return next((n for n in nodes if isinstance(n, ast.ClassDef) and n.name == name), None)


def _method_of(kind: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    return next((n for n in kind.body if isinstance(n, ast.FunctionDef) and n.name == name), None)


def _file_of(name: str) -> Path | None:
    if name in _LIGHTNING:
        spec = find_spec("lightning")  # a top-level package is found without importing it
        places = list(spec.submodule_search_locations or []) if spec else []
        return Path(places[0], "pytorch", _LIGHTNING[name]) if places else None
    module = vars(ant_lightning)["_HOME_OF"].get(name)
    return module and Path(ant_lightning.__file__).parents[1] / f"{module.replace('.', '/')}.py"
