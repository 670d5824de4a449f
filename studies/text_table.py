"""Tables as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ant_lightning.files.atomic import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["TextTable"]


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Attributes:
        title: What stands above it in Markdown, and its file's name in small letters.
        columns: Heads.
        rows: As many cells each as there are heads.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table, without its title."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(_escaped(cells)) + " |" for cells in lines) + "\n"

    def csv(self) -> str:
        """The table with a line of heads."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return file.getvalue()

    def write(self, folder: Path) -> None:
        """Write `<title>.csv`, in small letters with `_` for spaces."""
        name = self.title.lower().replace(" ", "_").replace(",", "")
        write_text(folder / f"{name}.csv", self.csv())


def _escaped(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]
