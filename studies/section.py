"""Sections of docs/results.md that are written from rows."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ant_lightning.files.atomic import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["replace_section", "where_it_ran"]


def replace_section(page: Path, name: str, text: str) -> None:
    """Put a text between `<!-- name: begin -->` and `<!-- name: end -->`, at the end if new."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = (page.read_text() if page.exists() else "").partition(begin)
    after = rest.partition(end)[2] or "\n"
    write_text(page, f"{before.rstrip()}\n\n{begin}\n{text.rstrip()}\n{end}{after}")


def where_it_ran(rows: Mapping[str, Mapping[str, Any]], *, total: int) -> str:
    """How many cells of a study of `total` have run, for how long, on what, at which commits."""
    machines = Counter(row["machine"] for row in rows.values())
    where = "; ".join(f"{name} ({count} cells)" for name, count in machines.most_common())
    hours = sum(sum(row["seconds"]) for row in rows.values()) / 3600
    commits = ", ".join(sorted({row["commit"] for row in rows.values()}))
    finished = f"{len(rows)} of {total} cells finished, {hours:.1f} core-hours"
    return f"{finished}, on {where}; commits {commits}"
