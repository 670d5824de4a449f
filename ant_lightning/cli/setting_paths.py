"""Puts the path of a setting before an error or a warning in which an object names its argument.

`SNRClustering` raises `num_tasks: must be at least 1, found 0`, wherever it is used. Only the
command line knows which setting made it, and says `model.tasks.clustering.num_tasks: must ...`.
"""

from __future__ import annotations

import re
import sys
import warnings
from traceback import walk_stack, walk_tb
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from ant_lightning.cli.messages import first_config_error
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

    from jsonargparse import ArgumentParser


class SettingPaths:
    """Makes the objects of a configuration; inside, their errors and warnings get their paths."""

    def __init__(self) -> None:
        self.settings = Namespace()  # the configuration that the objects are made from
        self._made: dict[int, tuple[Any, dict[str, Any]]] = {}

    def __enter__(self) -> SettingPaths:
        self._form = warnings.formatwarning
        warnings.formatwarning = self._warning
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:  # noqa: ANN401
        warnings.formatwarning = self._form
        if isinstance(error, ConfigError):
            # The innermost frame first.
            frames = [frame for frame, _ in walk_tb(error.__traceback__)][::-1]
            error.args = (self._with_path(str(error), frames),)

    def make(self, parser: ArgumentParser, parse: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Parse settings and make their objects.

        Raises:
            ConfigError: If the parser or a constructor raised an error of any kind.
        """
        try:
            self.settings = parse()
        except Exception as error:  # the parser has errors of several kinds
            raise first_config_error(error, parser._option_string_actions) from error
        try:
            return parser.instantiate(self.settings, instantiators=[(self, object, True)])
        except Exception as error:  # constructors may raise anything
            raise first_config_error(error) from error

    def __call__(self, class_type: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Make an object; the parser calls this in place of `class_type(*args, **kwargs)`."""
        return self.remember(class_type(*args, **kwargs), kwargs)

    def remember(self, made: Any, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        """Remember the arguments of an object; returns the object."""
        # The object is kept too: if it were freed, another could get its id.
        self._made[id(made)] = (made, arguments)
        return made

    def _warning(self, message: Warning | str, *where: Any, **line: Any) -> str:
        """The lines of a warning, which is given while the methods that led to it still run."""
        frames = (frame for frame, _ in walk_stack(sys._getframe()))
        return self._form(self._with_path(str(message), frames), *where, **line)

    def _with_path(self, message: str, frames: Iterable[FrameType]) -> str:
        """The message with a path before its first word, if that is an argument of an object."""
        first = re.match(r"(\w+)[\w.,\[\] ]*:", message)
        name = first.group(1) if first else None
        # From the innermost frame outwards: the object whose method speaks comes before the one
        # that holds it. In a constructor, the object is not known yet, but the frame of our
        # `__call__` has its class and arguments.
        for frame in frames:
            variables = frame.f_locals
            made, arguments = self._made.get(id(variables.get("self")), (None, {}))
            kind = type(made)
            if frame.f_code.co_name == "__call__" and "class_type" in variables:
                kind, arguments = variables["class_type"], variables["kwargs"]  # in a constructor
            if name in arguments:
                path = _path_of(kind, arguments, self.settings)
                if not path:
                    return message
                # More of its settings may follow: `seed: was 1, is 2; batch_size: was 3, is 4`.
                others = rf"; (?=({'|'.join(arguments)}): )"
                return f"{path}.{re.sub(others, f'; {path}.', message)}"
        return message


def _path_of(kind: Any, arguments: dict[str, Any], settings: Namespace) -> str | None:  # noqa: ANN401
    """The first setting that makes an object of this class from these arguments."""
    for path, class_path, inner in _objects(settings, ""):
        # Two objects of one class are told apart by their plain arguments.
        fits = class_path is None or class_path.rpartition(".")[-1] == kind.__name__
        if fits and inner.keys() == arguments.keys():
            plain = {n: v for n, v in arguments.items() if v is None or type(v) in _PLAIN}
            if all(inner[name] == value for name, value in plain.items()):
                return path
    return None


_PLAIN = (bool, float, int, str)


def _objects(value: Any, path: str) -> Iterator[tuple[str, str | None, dict[str, Any]]]:  # noqa: ANN401
    """Path, class (None where the type alone decides it) and arguments of each object."""
    if isinstance(value, list):
        for i, each in enumerate(value):
            yield from _objects(each, f"{path}[{i}]")
    elif isinstance(value, Namespace):
        inner = dict(vars(value))
        class_path = inner.get("class_path")
        if class_path is not None:
            init_args = inner.get("init_args") or Namespace()
            inner = {**vars(init_args), **(inner.get("dict_kwargs") or {})}
        yield path, class_path, inner
        for name, each in inner.items():
            yield from _objects(each, f"{path}.{name}" if path else name)
