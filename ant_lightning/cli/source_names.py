"""Names of classes and their arguments, read from source files without importing them."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["arguments_of", "class_names", "lightning_arguments"]

_PACKAGE = Path(__file__).parent.parent
_DEFINED = re.compile(r"^(?:(?:class|def) )?(\w+)(?=[(:]| = )", re.MULTILINE)


@cache
def class_names() -> dict[str, Path]:
    """Top-level names of this package (classes, functions, variables), each with its file."""
    found = {}
    for path in sorted(_PACKAGE.rglob("*.py")):
        for name in _DEFINED.findall(path.read_text(encoding="utf8")):
            found[name] = path
    return found


def arguments_of(name: str) -> set[str] | None:
    """Constructor arguments of one of our classes; None if its source does not tell.

    A constructor that takes `**kwargs` also has the arguments of its bases.
    """
    path = class_names().get(name)
    return None if path is None else _constructor(path, name)


def lightning_arguments(path: str, name: str, method: str = "__init__") -> set[str] | None:
    """Arguments of a method of the installed Lightning; None if it is not found.

    Args:
        path: The file, relative to `lightning/pytorch`.
        name: The class.
        method: The method of the class.
    """
    spec = find_spec("lightning")  # a top-level package is found without importing it
    places = list(spec.submodule_search_locations or []) if spec else []
    file = Path(places[0], "pytorch", path) if places else None
    if file is None or not file.is_file():
        return None
    return _constructor(file, name, method)


def _constructor(path: Path, name: str, method: str = "__init__") -> set[str] | None:
    kind = next(
        (n for n in _tree(path).body if isinstance(n, ast.ClassDef) and n.name == name), None
    )
    if kind is None:
        return None
    made = next((n for n in kind.body if isinstance(n, ast.FunctionDef) and n.name == method), None)
    bases = [_last(base) for base in kind.bases]
    if made is None:
        return _inherited(bases)
    each = made.args
    own = {arg.arg for arg in (*each.posonlyargs, *each.args, *each.kwonlyargs)} - {"self"}
    if each.kwarg is None and each.vararg is None:
        return own
    handed_on = _inherited(bases)
    return None if handed_on is None else own | handed_on


def _inherited(bases: list[str]) -> set[str] | None:
    """Constructor arguments of all bases together; None if any base is unknown."""
    found: set[str] = set()
    for base in bases:
        known = (
            lightning_arguments("callbacks/model_checkpoint.py", base)
            if base == "ModelCheckpoint"
            else arguments_of(base)
        )
        if known is None:
            return None
        found |= known
    return found if bases else None


def _last(base: ast.expr) -> str:
    """The name of a base class, without module and type arguments."""
    if isinstance(base, ast.Subscript):
        base = base.value
    return base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf8"))
