"""What the files of a sample in WebDataset's format are: the image and the label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ant_lightning.data.pictures import SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

MAX_LABEL = 2**62


def image_entry(extensions: Collection[str], image: str | None) -> str:
    """The extension of the image of a sample: `image`, or the only one of an image.

    Raises:
        ValueError: If there is none, or more than one.
    """
    found = [each for each in extensions if Path(f"x.{each}").suffix in SUFFIXES]
    if image is not None:
        found = [each for each in extensions if each == image.lower()]
    if len(found) != 1:
        wanted = "one image" if image is None else f"a file .{image}"
        raise ValueError(f"{wanted}, found {', '.join(extensions)}; see `image`")
    return found[0]


def label_of_entries(
    extensions: Collection[str], label: str | None, read: Callable[[str], bytes]
) -> int | None:
    """The label of a sample: of `cls` or `json:ENTRY`; `None` if it is not asked for and missing.

    Args:
        extensions: What the sample has.
        label: Extension of the label; `None`: `cls` if there is one.
        read: The content of an extension.

    Raises:
        ValueError: If it is missing, or no whole number.
    """
    extension, _, entry = (label or "cls").partition(":")
    if extension not in extensions:
        if label is None:
            return None
        raise ValueError(f"a file .{extension}, found {', '.join(extensions)}")
    content = read(extension)
    try:
        value = json.loads(content)[entry] if entry else int(content)
    except (ValueError, KeyError, TypeError, RecursionError):
        value = content[:40]
    if type(value) is not int or not 0 <= value < MAX_LABEL:
        raise ValueError(f"a whole number as label, found {value!r:.60}")
    return value
