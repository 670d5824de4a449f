"""A command of a study: choose the best of several runs and write its setting as a config.

`[studies.choose, --output, "<>", --yaml, "model: {...: VALUE}", "0.001=<a>", ...]`
reads the excess risk of each run's folder, and writes `chosen.yaml` (the text with the best value)
and `choice.json` (all scores). A run's score is the mean over clusters of the log excess risk at
its end, so that clusters with a large loss do not count more. With `--metric fid` it is the FID at
its end.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant_lightning.errors import ConfigError
from ant_lightning.files.atomic import write_text
from studies.results import read_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["last_fid", "log_excess", "main"]


def log_excess(folder: Path) -> float:
    """Mean over clusters of the log of the last excess risk measured in a run.

    Raises:
        ConfigError: If none was measured.
    """
    values = _last_row(folder, "excess_risk.jsonl")["tasks"]["excess"]
    return sum(math.log(value) for value in values) / len(values)


def last_fid(folder: Path) -> float:
    """The last FID measured in a run.

    Raises:
        ConfigError: If none was measured.
    """
    return float(_last_row(folder, "generation_metrics.jsonl")["scores"]["fid"])


def _last_row(folder: Path, name: str) -> dict[str, Any]:
    rows = read_rows(folder / name)
    if not rows:
        raise ConfigError(f"choose: {folder} must hold {name}, found none")
    return rows[-1]


_SCORES = {"log_excess": log_excess, "fid": last_fid}


def main(args: Sequence[str]) -> int:
    """Write `chosen.yaml` and `choice.json`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--yaml", required=True)
    parser.add_argument("--metric", choices=tuple(_SCORES), default="log_excess")
    parser.add_argument("candidates", nargs="+", help="VALUE=FOLDER")
    settings = parser.parse_args(args)
    pairs = [candidate.split("=", 1) for candidate in settings.candidates]
    score = _SCORES[settings.metric]
    scores = {value: score(Path(folder)) for value, folder in pairs}
    best = min(scores, key=lambda value: scores[value])
    choice = {"chosen": float(best), settings.metric: scores}
    write_text(settings.output / "choice.json", json.dumps(choice))
    write_text(settings.output / "chosen.yaml", settings.yaml.replace("VALUE", best) + "\n")
    print(f"chosen: {best} of {scores}")
    return 0
