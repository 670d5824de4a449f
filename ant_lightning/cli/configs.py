"""`ant-lightning configs` lists the configs that come with the package, with a line for each.

`ant-lightning configs show NAME > my.yaml` copies one.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import ant_lightning
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def config_names() -> dict[str, Path]:
    """Name and file of every shipped config, `{"digits/dit": .../configs/digits/dit.yaml, ..}`."""
    package = Path(ant_lightning.__file__).parent
    # A wheel has them inside the package, a checkout beside it.
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.glob("*/*.yaml"))
    }


def find_config(name: str) -> Path:
    """The file of a shipped config.

    Raises:
        ConfigError: If there is none of this name; says the nearest ones.
    """
    known = config_names()
    if name not in known:
        file = f"{name}.yaml"
        meant = f"; did you mean {file!r}?" if Path(file).is_file() else _nearest(name, known)
        raise ConfigError(
            f"config: must be a file or a name that `ant-lightning configs` lists, found {name!r}"
            f"{meant}"
        )
    return known[name]


def with_paths_of_configs(args: Sequence[str]) -> list[str]:
    """The arguments of a command with every name of a config replaced by the path of its file.

    A name has no suffix and a path ends in .yaml. Other existing files (`/dev/fd/63`) and settings
    given inline (`{...}`) are left as they are.

    Raises:
        ConfigError: If a name is unknown.
    """
    found = list(args)
    for i, arg in enumerate(found):
        option, sign, value = arg.partition("=")
        if option not in {"--config", "-c"}:
            continue
        if sign:
            found[i] = f"{option}={_path_of(value)}"
        elif i + 1 < len(found):
            found[i + 1] = _path_of(found[i + 1])
    return found


def run_configs(args: Sequence[str]) -> None:
    """`configs`: list names with a line each; `configs show NAME`: print the file of one.

    Raises:
        ConfigError: If the arguments are others, or the name is unknown.
    """
    if not args:
        known = config_names()
        width = max(map(len, known))
        # In one piece: `| head` closes the pipe after the first.
        print("\n".join(f"{n:{width}}  {_first_sentence(path)}" for n, path in known.items()))
    elif args[0] == "show" and len(args) > 1:
        for name in args[1:]:
            print(find_config(name).read_text(encoding="utf8"), end="")
    else:
        raise ConfigError(f"configs: takes nothing or `show NAME`, found {' '.join(args)!r}")


def _path_of(value: str) -> str:
    known = config_names()
    if value not in known and _is_no_name(value):
        inside = value.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
        if inside in known and not Path(value).exists():  # a path of the repository, elsewhere
            raise ConfigError(f"config: found nothing at {value}; did you mean {inside!r}?")
        return value
    return str(find_config(value))


def _is_no_name(value: str) -> bool:
    """Whether it is a path, of a file that may be missing, or settings given inline."""
    is_path = value.endswith((".yaml", ".yml", ".json")) or Path(value).exists()
    return is_path or value.strip()[:1] in {"", "/", ".", "~", "{"}


def _nearest(name: str, known: Iterable[str]) -> str:
    same = [each for each in known if each.rpartition("/")[-1] == name.rpartition("/")[-1]]
    close = list(dict.fromkeys([*get_close_matches(name, known, n=2), *same]))[:3]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _first_sentence(path: Path) -> str:
    """The comment in the first line, without its full stop."""
    return path.read_text(encoding="utf8").partition("\n")[0].removeprefix("# ").rstrip(".")
