"""Names of the arguments of classes, read from source files without importing them."""

from __future__ import annotations

import ast
import re
from copy import copy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import ant_lightning

_NUMBERS = {"int": "a whole number", "float": "a number"}
_NONE = re.compile(r" \| None$|^Optional\[|\]$")
# Package and file of what others have.
_FILES = {
    "Trainer": ("lightning", "pytorch/trainer/trainer.py"),
    "ModelCheckpoint": ("lightning", "pytorch/callbacks/model_checkpoint.py"),
    "CSVLogger": ("lightning", "pytorch/loggers/csv_logs.py"),
    "MLFlowLogger": ("lightning", "pytorch/loggers/mlflow.py"),
    "TensorBoardLogger": ("lightning", "pytorch/loggers/tensorboard.py"),
    "SummaryWriter": ("torch", "utils/tensorboard/writer.py"),
    "WandbLogger": ("lightning", "pytorch/loggers/wandb.py"),
    "init": ("wandb", "sdk/wandb_init.py"),
}
# What gets the `**kwargs` of a class, if not its base.
_GIVEN_TO = {"TensorBoardLogger": ("SummaryWriter",), "WandbLogger": ("init",)}


@cache
def arguments_of(name: str, method: str = "__init__") -> frozenset[str] | None:
    """The arguments that a class takes, or one of its methods.

    Those of the bases count as well where the constructor is inherited or takes `**kwargs`.

    Args:
        name: One of our public classes, or one of `_FILES`.
        method: The method.

    Returns:
        The names; `None` if the source does not tell.
    """
    found = class_of(name)
    if found is None:
        return None
    made = method_of(found, method)
    own: frozenset[str] = frozenset()
    if made is not None:
        own = frozenset(each.arg for each in (*made.args.args, *made.args.kwonlyargs)) - {"self"}
        if made.args.kwarg is None:
            return own
    bases = [ast.unparse(base).rpartition(".")[-1] for base in found.bases]
    inherited = [arguments_of(base) for base in _GIVEN_TO.get(name, bases)]
    known = [each for each in inherited if each is not None]
    return own.union(*known) if known and len(known) == len(inherited) else None


@cache
def numbers_of(name: str) -> dict[str, str]:
    """The arguments of a class that are one number or `None`, and which kind in words."""
    found = class_of(name)
    if found is None:
        return {}
    made = method_of(found, "__init__")
    own = [*made.args.args, *made.args.kwonlyargs] if made else []
    kinds = {a.arg: _NONE.sub("", ast.unparse(a.annotation)) for a in own if a.annotation}
    fields = [] if made else [each for each in found.body if isinstance(each, ast.AnnAssign)]
    kinds |= {ast.unparse(f.target): _NONE.sub("", ast.unparse(f.annotation)) for f in fields}
    bases = found.bases if made is None or made.args.kwarg else []
    inherited = [numbers_of(ast.unparse(base).rpartition(".")[-1]) for base in bases]
    numbers = {n: rule for each in inherited for n, rule in each.items() if n not in kinds}
    return numbers | {n: _NUMBERS[kind] for n, kind in kinds.items() if kind in _NUMBERS}


@cache
def choices_of(name: str) -> dict[str, tuple[object, ...]]:
    """The arguments of a class that are one of a few values, and these values."""
    found = class_of(name)
    made = found and method_of(found, "__init__")
    own = [*made.args.args, *made.args.kwonlyargs] if made else []
    kinds = {each.arg: ast.unparse(each.annotation) for each in own if each.annotation}
    if found and not made:
        fields = [each for each in found.body if isinstance(each, ast.AnnAssign)]
        kinds = {ast.unparse(each.target): ast.unparse(each.annotation) for each in fields}
    choices = {argument: _values(kind, _file_of(name)) for argument, kind in kinds.items()}
    return {argument: values for argument, values in choices.items() if values}


def _values(annotation: str, path: Path | None) -> tuple[object, ...]:
    """The values of a `Literal`, written out or under a name that this file defines or imports."""
    kind = annotation.removesuffix(" | None")
    literal = re.fullmatch(r"Literal\[(.*)\]", kind)
    if literal:
        found: tuple[object, ...] = ast.literal_eval(f"({literal[1]},)")
        return found
    if path is None or not kind.isidentifier():
        return ()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == kind:
            return _values(ast.unparse(node.value), None)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == kind and node.value:
            return _values(ast.unparse(node.value), None)
        if isinstance(node, ast.ImportFrom) and kind in {each.name for each in node.names}:
            return _values(kind, _file_of_module(node.module or ""))
    return ()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf8"))


def _file_of_module(name: str) -> Path | None:
    """The file of one of our modules."""
    path = Path(ant_lightning.__file__).parents[1] / f"{name.replace('.', '/')}.py"
    return path if name.startswith("ant_lightning.") and path.is_file() else None


@cache
def needed_arguments_of(name: str) -> tuple[str, ...]:
    """The arguments without a default of the constructor that one of our classes defines."""
    found = class_of(name)
    made = found and method_of(found, "__init__")
    if not made:
        return ()
    first = made.args.args[1 : len(made.args.args) - len(made.args.defaults)]  # without self
    others = zip(made.args.kwonlyargs, made.args.kw_defaults, strict=True)
    return (*(each.arg for each in first), *(each.arg for each, value in others if value is None))


def class_of(name: str) -> ast.ClassDef | None:
    """The source of one of our public classes, or of `_FILES`; `None` if it is not found."""
    path = _file_of(name)
    nodes = _tree(path).body if path and path.is_file() else []
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name == name:  # as a class that it makes
            made = copy(node)
            made.name = "__init__"
            return ast.ClassDef(name, bases=[], keywords=[], body=[made], decorator_list=[])
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    return None


def method_of(kind: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    """The method of a class that it defines itself."""
    return next((n for n in kind.body if isinstance(n, ast.FunctionDef) and n.name == name), None)


def _file_of(name: str) -> Path | None:
    if name in _FILES:
        package, file = _FILES[name]
        spec = find_spec(package)  # a top-level package is found without importing it
        places = list(spec.submodule_search_locations or []) if spec else []
        return Path(places[0], file) if places else None
    return _file_of_module(vars(ant_lightning)["_HOME_OF"].get(name, ""))
