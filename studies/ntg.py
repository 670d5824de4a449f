"""`python -m studies.ntg runs/ntg`: bars and tables of the negative-transfer gap.

Writes `ntg.png`, `ntg.md` and a CSV file for each table into the study's folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant_lightning.errors import ConfigError
from ant_lightning.files.atomic import write_figure, write_text
from ant_lightning.transfer.figure import transfer_gap_bars
from ant_lightning.transfer.result import TransferGapResult
from studies.results import finished_rows, read_rows
from studies.study import Study
from studies.text_table import TextTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ant_lightning.transfer.gap import GapEstimate
    from ant_lightning.transfer.result import IntervalGap

__all__ = ["gap_results", "gap_table", "main", "mean_table"]

_FILE = "negative_transfer_gap.jsonl"


def main(args: Sequence[str] | None = None) -> int:
    """Draw and tabulate the finished cells; returns 0, or 2 if there are none."""
    parser = argparse.ArgumentParser(prog="python -m studies.ntg")
    parser.add_argument("folder", type=Path, help="of the study, or a .jsonl file of its rows")
    parser.add_argument("--study", type=Path, default=Path("studies/ntg.yaml"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="by default the folder")
    settings = parser.parse_args(args)
    folder: Path = settings.folder
    output: Path = settings.output or (folder if folder.is_dir() else folder.parent)
    try:
        if folder.is_dir():  # which may hold rows of settings that have changed since
            rows = list(
                finished_rows(Study.read(settings.study), folder / "results.jsonl").values()
            )
        else:
            rows = read_rows(folder)
        results = gap_results(rows, seed=settings.seed)
    except ConfigError as error:
        print(f"ntg: error: {error}", file=sys.stderr)
        return 2
    write_figure(output / "ntg.png", transfer_gap_bars(results))
    tables = [mean_table(results), gap_table(results)]
    for table in tables:
        table.write(output)
    saved = next(iter(results.values()))
    text = "\n".join(f"### {table.title}\n\n{table.markdown()}" for table in tables)
    if saved.sampler_steps:
        text += (
            f"\nA shared prefix of the trajectories was sampled once: {saved.sampler_steps} "
            f"denoising steps for an image of each kind in place of {saved.sampler_steps_unshared}"
            f" ({1 - saved.sampler_steps / saved.sampler_steps_unshared:.0%} saved).\n"
        )
    write_text(output / "ntg.md", text)
    print(text)
    return 0


def gap_results(
    rows: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> dict[str, TransferGapResult]:
    """The gaps of each method, from the rows of a study, the latest of each cell.

    Raises:
        ConfigError: If no row of that seed has a measurement.
    """
    results = {}
    for row in rows:
        measured = (row.get("files") or {}).get(_FILE)
        if measured and row["axes"].get("seed") == seed:
            last = measured[-1]
            names = TransferGapResult.__dataclass_fields__
            results[str(row["axes"]["method"])] = TransferGapResult.from_row(
                {name: last[name] for name in names}
            )
    if not results:
        raise ConfigError(f"rows: must hold a {_FILE} of seed {seed}, found none in {len(rows)}")
    return results


def gap_table(results: Mapping[str, TransferGapResult]) -> TextTable:
    """Both gaps of each interval, with both budgets beside each other."""
    budgets = next(iter(results.values())).budgets
    heads = ["method", "timesteps"]
    for budget in budgets:
        heads += [f"steps, by {budget}", f"loss gap, by {budget} (%)", f"FID gap, by {budget}"]
    rows = []
    for method, result in results.items():
        columns = [result.of_budget(budget) for budget in budgets]
        for gaps in zip(*columns, strict=True):
            cells = [method, f"{gaps[0].start}-{gaps[0].stop - 1}"]
            for gap in gaps:
                cells += [f"{gap.specialist_steps} of {result.multitask_steps}", *_both(gap)]
            rows.append(cells)
    return TextTable("Negative-transfer gap of each interval", heads, rows)


def mean_table(results: Mapping[str, TransferGapResult]) -> TextTable:
    """The mean gap over intervals of each method, and in how many an interval excludes 0."""
    budgets = next(iter(results.values())).budgets
    heads = ["method", "FID of the model"]
    for budget in budgets:
        heads += [f"mean loss gap, by {budget} (%)", "below / above 0"]
        heads += [f"mean FID gap, by {budget}", "below / above 0"]
    rows = []
    for method, result in results.items():
        cells = [method, f"{result.gaps[0].multitask_fid:.2f}"]
        for budget in budgets:
            gaps = result.of_budget(budget)
            for estimates, factor, digits in (
                ([gap.relative_loss_gap for gap in gaps], 100, 2),
                ([gap.fid_gap for gap in gaps], 1, 3),
            ):
                mean = factor * sum(each.value for each in estimates) / len(estimates)
                below = sum(each.high < 0 for each in estimates)
                above = sum(each.low > 0 for each in estimates)
                cells += [f"{mean:+.{digits}f}", f"{below} / {above} of {len(gaps)}"]
        rows.append(cells)
    return TextTable("Mean negative-transfer gap", heads, rows)


def _both(gap: IntervalGap) -> list[str]:
    return [_shown(gap.relative_loss_gap, 100, 2), _shown(gap.fid_gap, 1, 3)]


def _shown(gap: GapEstimate, factor: float, digits: int) -> str:
    value, low, high = (f"{factor * each:+.{digits}f}" for each in gap)
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    sys.exit(main())
