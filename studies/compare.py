"""`python -m studies.compare`: the table of `make compare`, from its rows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.results import finished_rows
from studies.statistics import difference_text, mean_and_spread
from studies.study import Study
from studies.text_table import TextTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["comparison", "main"]

METRICS = ("fid", "fid_train", "fid_real", "precision", "recall", "class_agreement")


def comparison(rows: Iterable[Mapping[str, Any]]) -> TextTable:
    """Mean and standard deviation over seeds, and FID against vanilla's of the same seeds."""
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        last = row["files"]["generation_metrics.jsonl"][-1]
        scores.setdefault(row["axes"]["method"], {})[row["axes"]["seed"]] = last["scores"]
    vanilla = scores.get("vanilla", {})
    body = []
    for method, seeds in scores.items():
        line = [method]
        for metric in METRICS:
            values = [each[metric] for each in seeds.values() if metric in each]
            line.append(mean_and_spread(values, digits=3))
        gaps = [s["fid"] - vanilla[seed]["fid"] for seed, s in seeds.items() if seed in vanilla]
        line.append("" if method == "vanilla" else difference_text(gaps, digits=2))
        body.append(line)
    heads = ["method", *METRICS, "FID - vanilla, paired [95% interval]"]
    return TextTable("Methods at the same budget", heads, body)


def main(args: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m studies.compare")
    parser.add_argument("--study", type=Path, default=Path("studies/compare.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"))
    settings = parser.parse_args(args)
    rows = finished_rows(Study.read(settings.study), settings.folder / "results.jsonl")
    print(comparison(rows.values()).markdown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
