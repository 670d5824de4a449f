"""A study file: what its cells are, in which order they run, and what each depends on.

```yaml
parts:                                   # lists of arguments; "@base" in a list puts one there
  base: [--config, configs/digits/dit.yaml, --config, configs/clustering/snr.yaml]
  method:                                # with levels: "@method" is the list of the cell's level
    vanilla: [--config, configs/balancer/vanilla.yaml]
    uw: [--config, configs/balancer/uw.yaml]
groups:                                  # run in this order, as far as cells need no others
  - cell: "{method}/seed{seed}"          # name of each cell
    axes: {seed: [0, 1], method: [vanilla, uw]}              # the last axis varies fastest
    commands:
      - [fit, "@base", "@method", "--seed_everything={seed}"]
      - [validate, "@base", "@method", "--ckpt_path=<>/checkpoints/last.ckpt"]
    collect: [generation_metrics.jsonl]  # files of the cell's folder that its row keeps
  - cell: "affinity/seed{seed}"
    axes: {seed: [0, 1]}
    commands:
      - [validate, "@base", "--ckpt_path=<vanilla/seed{seed}>/checkpoints/last.ckpt"]
```

"@first:method" is a part with lists for some levels of `method`, and nothing for the others; a
command of nothing is left out. In every text `{axis}` is the cell's level, `<>` the cell's folder
(which is also the log folder of its runs), and `<name>` the folder of another cell: a cell that
names another is run after it, and again if the other one's settings change. A command is one of the
command line (`fit`, `validate`, `test`, `predict`, `encode`), or a Python module whose `main(args)`
is called, such as `studies.choose`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ant_lightning.errors import ConfigError
from studies.provenance import config_hash

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["CLI_COMMANDS", "FOLDER", "Cell", "Study"]

CLI_COMMANDS = ("fit", "validate", "test", "predict", "encode")
FOLDER = re.compile(r"<([^<>]*)>")
_FILE = re.compile(r"<([^<>]+)>/([^\s,<>]+)")


@dataclass(frozen=True)
class Cell:
    """One unit of a study: some commands that leave files in a folder of their own.

    Attributes:
        name: Unique in the study.
        axes: Level of each axis.
        commands: Arguments of each command; folders are still written `<name>`.
        collect: Files that the row keeps.
        needs: Names of the cells whose folders the commands name.
        hash: Of commands, the YAML files that they name, and the hashes of `needs`.
    """

    name: str
    axes: Mapping[str, Any]
    commands: tuple[tuple[str, ...], ...]
    collect: tuple[str, ...]
    needs: tuple[str, ...]
    hash: str

    @property
    def place(self) -> str:
        """Folder of the cell, relative to that of the study: other settings, another folder."""
        return f"cells/{self.name}-{self.hash[:8]}"

    @property
    def files_of_others(self) -> set[tuple[str, str]]:
        """Name of another cell and path in its folder, for every file or folder that it needs."""
        found = (m for command in self.commands for arg in command for m in _FILE.findall(arg))
        return set(found)


@dataclass(frozen=True)
class Study:
    """The cells of a study file, by name, in the order in which they are run.

    `Study.read(path)` makes one; see the module for the form of the file.
    """

    cells: Mapping[str, Cell]

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a study file.

        Raises:
            ConfigError: If there is no such file, or it does not have the form of a study.
        """
        if not path.is_file():
            raise ConfigError(f"study: must be a YAML file that exists, found {path}")
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ConfigError(f"study: {path} is not YAML: {error}") from error
        return cls.of(content)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Study:
        """The study that a file's content describes; errors as for `read`."""
        if not isinstance(content, dict) or not isinstance(content.get("groups"), list):
            raise ConfigError("study: must be a mapping with a list `groups`, found none")
        unknown = set(content) - {"parts", "groups"}
        if unknown:
            raise ConfigError(f"study: may have parts and groups, found {sorted(unknown)}")
        drafts: dict[str, Cell] = {}
        for group in content["groups"]:
            for cell in _drafts(group, content.get("parts") or {}):
                if cell.name in drafts:
                    raise ConfigError(f"study: names of cells must differ, found {cell.name} twice")
                drafts[cell.name] = cell
        done: dict[str, Cell] = {}
        for name in drafts:
            _complete(name, drafts, done, ())
        return cls({name: done[name] for name in drafts})


def _drafts(group: Mapping[str, Any], parts: Mapping[str, Any]) -> Iterable[Cell]:
    """The cells of one group, not yet with a hash."""
    unknown = set(group) - {"cell", "axes", "commands", "collect"}
    if unknown or not {"cell", "commands"} <= set(group):
        raise ConfigError(
            f"study: a group has cell, axes, commands and collect, found {sorted(group)}"
        )
    axes: dict[str, list[Any]] = group.get("axes") or {}
    for levels in product(*axes.values()):
        cell_axes = dict(zip(axes, levels, strict=True))
        expanded = (tuple(_expand(command, cell_axes, parts)) for command in group["commands"])
        commands = tuple(command for command in expanded if command)
        name = _with_levels(group["cell"], cell_axes)
        named = {m for command in commands for arg in command for m in FOLDER.findall(arg)}
        yield Cell(
            name,
            cell_axes,
            commands,
            tuple(group.get("collect") or ()),
            tuple(sorted(named - {""})),
            "",
        )


def _expand(
    command: Iterable[Any], axes: Mapping[str, Any], parts: Mapping[str, Any]
) -> Iterable[str]:
    """The arguments of a command with `@part` and `{axis}` replaced."""
    for item in command:
        text = str(item)
        if not text.startswith("@"):
            yield _with_levels(text, axes)
            continue
        name, _, axis = text[1:].partition(":")
        part, level = parts.get(name), axes.get(axis or name)
        if isinstance(part, dict):
            part = part.get(level, [] if axis else None)
        if not isinstance(part, list):
            raise ConfigError(
                f"study: {text} must be one of parts {sorted(parts)}, with a list for the level "
                f"{level!r}, found none"
            )
        yield from _expand(part, axes, parts)


def _with_levels(text: str, axes: Mapping[str, Any]) -> str:
    for axis, level in axes.items():
        text = text.replace(f"{{{axis}}}", str(level))
    return text


def _complete(
    name: str, drafts: Mapping[str, Cell], done: dict[str, Cell], path: tuple[str, ...]
) -> Cell:
    """Give a cell its hash, after those it needs."""
    if name in done:
        return done[name]
    if name in path:
        raise ConfigError(f"study: cells need each other in a circle: {' -> '.join([*path, name])}")
    if name not in drafts:
        raise ConfigError(f"study: cell {path[-1]} needs <{name}>, which is no cell of the study")
    draft = drafts[name]
    needed = {n: _complete(n, drafts, done, (*path, name)).hash for n in draft.needs}
    settings = [draft.commands, draft.collect, _file_hashes(draft), needed]
    done[name] = Cell(
        name, draft.axes, draft.commands, draft.collect, draft.needs, config_hash(settings)
    )
    return done[name]


def _file_hashes(cell: Cell) -> dict[str, str]:
    """Hashes of the YAML files that the commands name."""
    hashes = {}
    for command in cell.commands:
        for arg in command:
            value = arg.rpartition("=")[2]
            if value.endswith((".yaml", ".yml")) and "<" not in value:
                path = Path(value)
                if not path.is_file():
                    raise ConfigError(f"study: cell {cell.name} needs the file {value}: not found")
                hashes[value] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes
