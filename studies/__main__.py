"""`python -m studies studies/NAME.yaml`: run or resume a study."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ant_lightning.errors import ConfigError
from studies.results import begin_with, finished_rows
from studies.runner import add_run_options, missing_cells, run_options, run_study
from studies.study import Study

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> int:
    """Run a study; returns 0, 1 if cells failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m studies")
    parser.add_argument("study", type=Path, help="a YAML file of studies/")
    parser.add_argument("--folder", type=Path, help="by default runs/NAME")
    parser.add_argument("--rows", type=Path, help="rows to begin with, if the folder has none")
    add_run_options(parser)
    parser.add_argument("--list", action="store_true", help="show what is missing; run nothing")
    settings = parser.parse_args(args)
    folder: Path = settings.folder or Path("runs") / settings.study.stem
    try:
        study = Study.read(settings.study)
        if settings.rows and settings.rows.is_file():
            begin_with(settings.rows, folder / "results.jsonl")
        if settings.list:
            missing = missing_cells(
                study, folder, only=settings.only, rerun_changed=settings.rerun_changed
            )
            done = finished_rows(study, folder / "results.jsonl")
            print(*(cell.name for cell in missing), sep="\n")
            hours = sum(sum(row["seconds"]) for row in done.values()) / 3600
            print(f"{len(missing)} to run; {len(done)} finished took {hours:.2f} core-hours")
            return 0
        failed = run_study(study, folder, **run_options(settings))
    except ConfigError as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
