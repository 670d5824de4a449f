"""YAML configs: checks before the parser reads them, so that errors name file and line."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import get_loader

import ant_lightning
from ant_lightning.cli.logger_names import with_logger_classes
from ant_lightning.cli.messages import no_such_setting
from ant_lightning.errors import ConfigError, FileError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

HELP = frozenset({"-h", "--help"})
FLAGS = HELP | {"--print_config"}
# Bounds of a text: aliases of aliases let a few hundred bytes unfold to gigabytes.
_MAX_BYTES = 2**20  # configs have kilobytes
_MAX_NODES = 50_000  # counted with every alias written out
_MAX_DEPTH = 60
_PLAIN = {
    f"tag:yaml.org,2002:{name}"
    for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")
}


# Those in C are many times as fast; an installation of PyYAML may lack them.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_load = get_loader("yaml")  # the parser's: it reads 1e-3 as a number, plain PyYAML as a text


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Writes enums, paths and numbers of NumPy as the plain values they are."""

    def plain(self, value: Any) -> yaml.Node:  # noqa: ANN401
        # An enum becomes its value, another object the plain type that it derives from, or a text.
        kinds = [kind for kind in (str, int, float) if isinstance(value, kind)]
        found = value.value if isinstance(value, Enum) else (*kinds, str)[0](value)
        return self.represent_data(found)


for _kind in (Enum, PurePath, str, int, float):  # `bool` has no subclasses
    _Dumper.add_multi_representer(_kind, _Dumper.plain)


class UnsafeYAMLError(yaml.YAMLError):  # type: ignore[misc]
    """Valid YAML, but with a size, depth, tag or repeated key that no config has."""


def config_paths(args: Sequence[str]) -> list[str]:
    """The files that `--config` and `-c` name; settings given inline (`{...}`) are left out."""
    found = []
    for i, arg in enumerate(args):
        name, sign, value = arg.partition("=")
        if name in {"--config", "-c"}:
            found += [value] if sign else list(args[i + 1 : i + 2])
    return [path for path in found if not path.lstrip().startswith("{")]


def import_named_classes(args: Sequence[str]) -> None:
    """Import the classes of ours that a command line or its files name.

    The package imports its classes lazily, and the parser finds a class only once it is imported.
    """
    texts = [*args, *(Path(path).read_text(encoding="utf8") for path in config_paths(args))]
    # A word that only looks like the name of a class costs an import and does no harm.
    named = set(re.findall(r"\w+", " ".join(texts))).intersection(ant_lightning.__all__)
    for name in ant_lightning.__all__ if HELP.intersection(args) else named:  # help lists them
        getattr(ant_lightning, name)


def check_config_file(
    path: str | Path, *, known: Collection[str] | None = None, inside: Iterable[str] = ()
) -> None:
    """Check that a file is a config: YAML of settings by name, each given once.

    Args:
        path: The file.
        known: Names allowed at the top level; `None` for any.
        inside: Paths of other settings, to suggest.

    Raises:
        FileError: If it is not; names the file, the line, the rule and what was found.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "something else" if path.exists() else "nothing"
        raise FileError(f"config: must be a YAML file, found {kind} at {path}")
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise FileError(f"{path}: must have at most {_MAX_BYTES} bytes, found {size}")
        root = _checked(path.read_text(encoding="utf8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line, column = (mark.line + 1, mark.column) if mark else (1, 0)
        *_, text = "", *path.read_text(encoding="utf8").split("\n")[:line]
        problem = "a tab, where YAML has spaces" if text[column:][:1] == "\t" else error.problem
        raise FileError(f"{path}: must be YAML, found in line {line}: {problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FileError(f"{path}: must be plain YAML in UTF-8, found: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        found = "nothing" if root is None else {"sequence": "a list"}.get(root.id, "one value")
        raise FileError(f"{path}: must hold settings by name, found {found}")
    for key, _ in root.value:
        if known is not None and key.value not in known:
            line = key.start_mark.line + 1
            raise FileError(f"{path}: line {line}: {no_such_setting(key.value, [*known, *inside])}")


def load_yaml(text: str) -> Any:  # noqa: ANN401 - whatever a value is
    """Load YAML as the parser does, after checking what its aliases unfold to.

    Loggers may have short names, as on the command line.

    Raises:
        yaml.YAMLError: If it is no YAML, or an `UnsafeYAMLError`.
        ConfigError: If it holds bytes that are not UTF-8, as a path on a command line can.
    """
    if text == "None":  # the parser passes on a null for a group of settings as this text
        return None
    # Python decodes bytes that are not UTF-8 to surrogates, U+DC80 to U+DCFF.
    if not text.isascii() and "\\udc" in ascii(text):
        raise ConfigError(
            f"a setting must be UTF-8, so that the run's config.yaml can hold them, found "
            f"{text!a}; give the path of a link to it whose name is"
        )
    if len(text) > 200 or "*" in text:  # a short text without an alias unfolds to itself
        _checked(text)
    found = _load(text)
    trainer = found.get("trainer") if isinstance(found, dict) else None
    if isinstance(trainer, dict) and "logger" in trainer:
        trainer["logger"] = with_logger_classes(trainer["logger"])
    return found


def plain_settings(text: str) -> Any:  # noqa: ANN401 - whatever the settings are
    """Read what `dump_yaml` wrote."""
    return yaml.load(text, Loader=_Loader)


def dump_yaml(data: Any) -> str:  # noqa: ANN401 - whatever the settings are
    """Write settings as the parser does, the defaults of third parties' classes included.

    The parser's own dumper refuses subclasses of plain types; a default of `Timer` is one.
    """
    dumped: str = yaml.dump(
        data, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False
    )
    return dumped


def _checked(text: str) -> yaml.Node | None:
    """The tree of a YAML text, checked for size, depth, tags and repeated keys.

    Raises:
        yaml.YAMLError: If it breaks a rule; no alias was unfolded by then.
    """
    root = yaml.compose(text, Loader=_Loader)
    if root is not None:
        _size(root, {}, 0)
    return root


def _size(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Number of nodes of a tree with all aliases written out; visits each distinct node once."""
    if depth > _MAX_DEPTH:
        raise _unsafe(node, f"more than {_MAX_DEPTH} levels, or an alias inside what it stands for")
    if node.tag not in _PLAIN:
        raise _unsafe(node, f"the tag {node.tag!r}, which could name code; plain values have none")
    # An alias is the same node object: counted each time that it occurs, but visited once.
    if id(node) not in sizes:
        size = 1 + sum(_size(child, sizes, depth + 1) for child in _children(node))
        if size > _MAX_NODES:
            raise _unsafe(node, f"aliases that unfold to more than {_MAX_NODES} values")
        sizes[id(node)] = size
    return sizes[id(node)]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _unsafe(key, "a name that is not a text")
            if key.value in seen:
                raise _unsafe(key, f"{key.value!r} twice, of which only the last would count")
            seen.add(key.value)
            yield value


def _unsafe(node: yaml.Node, finding: str) -> UnsafeYAMLError:
    return UnsafeYAMLError(f"line {node.start_mark.line + 1} has {finding}")
