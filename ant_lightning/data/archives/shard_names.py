"""The files that patterns of tar shards name; without PyTorch."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from ant_lightning.errors import ConfigError


def expanded_braces(pattern: str) -> list[str]:
    """Write out the ranges of a pattern as WebDataset does.

    Examples:
        >>> from ant_lightning.data.archives.shard_names import expanded_braces
        >>> expanded_braces("a-{08..10}.tar")
        ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    width = len(first) if first.startswith("0") else 0
    numbers = range(int(first), int(last) + 1)
    parts = [f"{pattern[: found.start()]}{i:0{width}}{pattern[found.end() :]}" for i in numbers]
    return [each for part in parts for each in expanded_braces(part)]


def shard_files(shards: str | list[str], *, setting: str = "shards") -> list[Path]:
    """The files of patterns, in their order; those of one pattern are sorted.

    Raises:
        ConfigError: If there are none, or one is missing; names the setting.
    """
    patterns = [shards] if isinstance(shards, str) else shards
    paths = []
    for pattern in (each for one in patterns for each in expanded_braces(one)):
        files = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        paths += [Path(each) for each in files]
    missing = [path for path in paths if not path.is_file()]
    if not paths or missing:
        found = f"no file {missing[0]}" if missing else f"none for {shards}"
        raise ConfigError(f"{setting}: must name tar files, found {found}")
    return paths
