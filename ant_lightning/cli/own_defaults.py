"""Own defaults of a class that is chosen in place of a default of another class.

`DiTModule` has a `DiscreteDiffusion` by default. If a `FlowMatching` is chosen, jsonargparse gives
it the `prediction_type` of that default, as both classes have an argument of this name.
"""

from __future__ import annotations

import inspect
import json
from copy import deepcopy
from importlib import import_module
from typing import TYPE_CHECKING, Any

import ant_lightning
from ant_lightning.cli.merged_settings import loaded, merge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def own_defaults(part: Mapping[str, Any], path: str) -> dict[str, str]:
    """Arguments that classes chosen in place of a default of another class would get from it.

    Args:
        part: Merged settings, `init_args` beside their `class_path`.
        path: Their path.

    Returns:
        The own value of each, by its path.
    """
    kind = our_class(part.get("class_path"))
    path += ".init_args" if "class_path" in part else ""
    found: dict[str, str] = {}
    for name, given in part.items():
        known = inspect.signature(kind).parameters.get(name) if kind else None
        default = known.default if known else None
        chosen = given if isinstance(given, dict) else {"class_path": given}
        other = any_class(chosen.get("class_path"))
        if other and _is_object(default) and type(default) is not other:
            lent = inspect.signature(type(default)).parameters
            for each in inspect.signature(other).parameters.values():
                if each.name in lent.keys() - chosen.keys() and each.default is not each.empty:
                    found[f"{path}.{name}.init_args.{each.name}"] = _as_option(each.default)
        if isinstance(given, dict):
            found |= own_defaults(given, f"{path}.{name}")
    return found


def _is_object(value: object) -> bool:
    return type(value).__module__.startswith(f"{ant_lightning.__name__}.")


def _as_option(default: object) -> str:
    """A default as an option says it; objects among them are made without arguments."""
    if isinstance(default, str):
        return default
    return f"ant_lightning.{type(default).__name__}" if _is_object(default) else json.dumps(default)


def with_own_defaults(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a part, `{class_path, init_args}`, in which these defaults are written out."""
    merged: dict[str, Any] = {}
    merge(merged, chosen)
    found = deepcopy(dict(chosen))
    for path, value in own_defaults(merged, "part").items():
        *inside, name = path.split(".")[1:]
        node = found
        for key in inside:
            if not isinstance(node.setdefault(key, {}), dict):  # a class by its name alone
                node[key] = {"class_path": node[key]}
            node = node[key]
        node[name] = loaded(value)
    return found


def our_class(name: object) -> Callable[..., Any] | None:
    """Our public class or preset of this name."""
    last = str(name).removeprefix("ant_lightning.")
    return getattr(ant_lightning, last) if last in ant_lightning.__all__ else None


def any_class(name: object) -> Callable[..., Any] | None:
    """The class of this name or import path; the parser imports it too, and names what is wrong."""
    module, _, last = str(name).rpartition(".")
    if our_class(name) is not None or not module:
        return our_class(name)
    try:
        found = getattr(import_module(module), last)
    except Exception:  # whatever a module of the user raises
        return None
    return found if callable(found) else None
