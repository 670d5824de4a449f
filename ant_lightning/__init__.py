"""Diffusion training as multi-task learning over clusters of timesteps."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.2.0.dev0"

# The stub lists the public names and the modules that define them. A name is imported when it is
# first used, so that `import ant_lightning.balancing` costs no more than torch.
_HOME_OF = {
    alias.name: str(node.module)
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text()).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 - the names of the stub


def __getattr__(name: str) -> Any:  # noqa: ANN401 - classes and functions of all kinds
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ant_lightning' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
