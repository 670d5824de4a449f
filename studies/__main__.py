"""`python -m studies configs/studies/NAME.yaml`: run or resume a study."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ant_lightning.errors import ConfigError
from studies.results import finished_rows
from studies.runner import missing_cells, run_study
from studies.study import Study

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> int:
    """Run a study; returns 0, 1 if cells failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m studies")
    parser.add_argument("study", type=Path, help="a file of configs/studies")
    parser.add_argument("--folder", type=Path, help="by default runs/NAME")
    parser.add_argument("--jobs", type=int, default=1, help="cells at the same time")
    parser.add_argument("--threads", type=int, default=1, help="of each cell")
    parser.add_argument("--only", default="*", help="pattern of names of cells, in quotes")
    parser.add_argument("--rerun-changed", action="store_true")
    parser.add_argument("--list", action="store_true", help="show what is missing; run nothing")
    settings = parser.parse_args(args)
    folder: Path = settings.folder or Path("runs") / settings.study.stem
    selection = {"only": settings.only, "rerun_changed": settings.rerun_changed}
    try:
        study = Study.read(settings.study)
        if settings.list:
            missing = missing_cells(study, folder, **selection)
            done = finished_rows(study, folder / "results.jsonl")
            print(*(cell.name for cell in missing), sep="\n")
            hours = sum(sum(row["seconds"]) for row in done.values()) / 3600
            print(f"{len(missing)} to run; {len(done)} finished took {hours:.2f} core-hours")
            return 0
        failed = run_study(study, folder, jobs=settings.jobs, threads=settings.threads, **selection)
    except ConfigError as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
