"""Writes docs/api.md: every public name with the first line of its docstring.

`python docs/make_api.py`; a test checks that the page is up to date.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import ant_lightning

PACKAGES = [
    "balancing",
    "clustering",
    "diffusion",
    "backbones",
    "analysis",
    "metrics",
    "data",
    "modules",
    "callbacks",
    "plotting",
    "studies",
    "runs",
    "diffusers_sampler",
    "randomness",
    "errors",
]


def page() -> str:
    """The whole page."""
    lines = [
        "# Public names",
        "",
        "What is listed here may be imported from its package and keeps its meaning; everything "
        "else is private. These are also importable from `ant_lightning` itself: "
        + ", ".join(f"`{name}`" for name in ant_lightning.__all__)
        + ".",
    ]
    for package in PACKAGES:
        module = import_module(f"ant_lightning.{package}")
        lines += ["", f"## `ant_lightning.{package}`", "", summary(module), ""]
        lines += ["| name | |", "|---|---|"]
        for name in sorted(module.__all__, key=str.lower):
            lines.append(f"| `{name}` | {summary(getattr(module, name))} |")
    return "\n".join(lines) + "\n"


def summary(thing: object) -> str:
    """First line of the docstring; for a plain value what it is."""
    if not (inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing)):
        return "a type alias or a constant"
    text = inspect.getdoc(thing) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page())
