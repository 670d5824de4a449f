"""Height and width: one number for a square, or a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from ant_lightning.errors import ConfigError

Size: TypeAlias = int | tuple[int, int]


def height_and_width(size: Size | Sequence[int], *, name: str = "input_size") -> tuple[int, int]:
    """The height and the width that a size means.

    Raises:
        ConfigError: If it is neither a whole number above 0 nor two of them.

    Examples:
        >>> from ant_lightning.sizes import height_and_width
        >>> height_and_width(8), height_and_width([8, 16])
        ((8, 8), (8, 16))
    """
    both = [size, size] if isinstance(size, int) else list(size) if _is_list(size) else []
    if len(both) != 2 or not all(type(each) is int and each >= 1 for each in both):
        raise ConfigError(
            f"{name}: must be at least 1, a whole number or a height and a width, found {size!r}"
        )
    return both[0], both[1]


def _is_list(size: object) -> bool:
    return isinstance(size, Sequence) and not isinstance(size, str)
