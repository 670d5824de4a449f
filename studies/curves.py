"""`python -m studies.curves`: tables and figures of image quality over training steps, from rows.

A cell is `model/group/method/seed`. Everything is compared with vanilla training of the same model
and seed. Holm's correction is over the methods of a table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant_lightning.files.atomic import write_figure, write_text
from studies.curves_figure import quality_curves
from studies.curves_tables import (
    GUIDANCE,
    METRICS,
    TASKS,
    TITLES,
    CurveRows,
    contrast_table,
    guidance_table,
    profile_table,
    score_table,
    steps_table,
    tasks_table,
    tuning_table,
)
from studies.results import finished_rows
from studies.section import replace_section, where_it_ran
from studies.study import Study

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["main", "section"]

# Groups with a picture.
_PICTURES = (
    *("ldm/snr", "ldm/why", "ldm/four_times", "adm/snr", "dit/fixed_variance", "sit/snr"),
    "shapes_ldm/snr",
)


def section(rows: Mapping[str, Mapping[str, Any]], pictures: Sequence[str], *, total: int) -> str:
    """The section of docs/results.md, of a study of `total` cells."""
    measured = CurveRows.of(rows)
    text = [
        f"`make curves`: {where_it_ran(rows, total=total)}. FID is that of the digits network at "
        "n = 360, and that of the shapes network at n = 500 for the shapes. The seed decides "
        "weights, order of the images, noise and first stage; seeds are "
        "paired. Intervals are 95%; ** survives Holm's correction over the methods of a table. "
        "On the digits the learning rate of each method was chosen of three by the FID of seed "
        "100; on the shapes it is that of the configs.",
        "",
    ]
    text += [line for name in pictures for line in (f"![{name}](results/{name})", "")]
    tables = [
        table
        for group in sorted(measured.curves, key=_place)
        if not group.startswith((GUIDANCE, TASKS))
        for table in (
            score_table(measured, group, _real(rows, measured, group)),
            steps_table(measured, group),
        )
    ]
    last = [contrast_table(measured), guidance_table(measured), tasks_table(measured)]
    last += [profile_table(rows), tuning_table(rows)]
    for table in [*tables, *last]:
        if table.rows:
            text += [f"### {table.title}", "", table.markdown(), ""]
    return "\n".join(text).rstrip() + "\n"


def _real(
    rows: Mapping[str, Mapping[str, Any]], measured: CurveRows, group: str
) -> Mapping[str, float]:
    """Scores of real images against real ones, of the data set of a group."""
    if group.startswith("shapes_"):
        return next(iter(measured.last(group, measured.methods(group)[0]).values()))
    found = rows.get("real", {}).get("files", {}).get("generation_metrics.jsonl", [{}])[-1]
    scores: Mapping[str, float] = found.get("scores", {})
    return scores


def _place(group: str) -> int:
    known = list(TITLES)
    return known.index(group) if group in known else len(known)


def main(args: Sequence[str] | None = None) -> int:
    """Write the section, the figures and the rows."""
    parser = argparse.ArgumentParser(prog="python -m studies.curves")
    parser.add_argument("--study", type=Path, default=Path("studies/curves.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("runs/curves"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    settings = parser.parse_args(args)
    study = Study.read(settings.study)
    found = finished_rows(study, settings.folder / "results.jsonl")
    rows = {name: found[name] for name in study.cells if name in found}
    measured = CurveRows.of(rows)
    if not measured.curves:
        print(f"curves: no finished run in {settings.folder}")
        return 1
    results: Path = settings.docs / "results"
    results.mkdir(parents=True, exist_ok=True)
    pictures = []
    for group in _PICTURES:
        if len(measured.methods(group)) > 1:  # else there is nothing to compare
            name = f"curves_{group.removesuffix('/snr').replace('/', '_')}.png"
            shown = dict.fromkeys(measured.methods(group), group)
            if group == "ldm/why":
                main_methods = (m for m in ("vanilla", "uw") if m in measured.methods("ldm/snr"))
                shown = dict.fromkeys(main_methods, "ldm/snr") | shown
            figure = quality_curves(
                {
                    m: {metric: measured.curve(of, m, metric) for metric in METRICS}
                    for m, of in shown.items()
                },
                title=TITLES[group],
                real=_real(rows, measured, group),
            )
            write_figure(results / name, figure)
            pictures.append(name)
    lines = (json.dumps(row) + "\n" for row in rows.values())
    write_text(results / "curves.jsonl", "".join(lines))
    page: Path = settings.docs / "results.md"
    replace_section(page, "curves", section(rows, pictures, total=len(study.cells)))
    print(f"{sum(len(m) for m in measured.curves.values())} methods of groups in {page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
