"""Sections of a report about quality: scores, sweeps, and whether balancing would help."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_KID = (
    " KID is torch-fidelity's, without the factor of 1,000 of many papers; it is unbiased, so it "
    "may be slightly below 0."
)
_SWEPT = ("fid", "fid_real", "kid", "precision", "recall", "class_agreement")


def table(*rows: Sequence[object]) -> str:
    """A table in Markdown; the first row holds the heads."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def scores_section(folder: Path, config: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """The newest scores of `generation_metrics.jsonl`, or why there are none.

    `state` is what the last checkpoint holds.
    """
    path = folder / "generation_metrics.jsonl"
    if not path.is_file():
        return f"## Scores\n\nNone: {_why_none(config, state)}.\n"
    last = json.loads(path.read_text().splitlines()[-1])
    about = ", ".join(f"{n} {v}" for n, v in last.items() if isinstance(v, str | int | float))
    rows = [[name, f"{value:.4g}"] for name, value in last["scores"].items()]
    kid = _KID if "kid" in last["scores"] else ""
    return f"## Scores\n\n{about}.{kid}\n\n{table(['score', 'value'], *rows)}"


def _why_none(config: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """What settings and checkpoint say about a run without scores."""
    if config.get("scores") is False:
        return "the run was told `--scores false`"
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    chosen = callbacks if isinstance(callbacks, list) else [callbacks]
    names = [each.get("class_path") if isinstance(each, dict) else each for each in chosen]
    if not any(str(name).rpartition(".")[2] == "GenerationMetrics" for name in names):
        return "`trainer.callbacks` has no `ant_lightning.GenerationMetrics`"
    stored = (each for name, each in state.get("callbacks", {}).items() if "Generation" in name)
    if any(each.get("is_off") for each in stored):
        return (
            "the network that scores had no weights, as `fit` said at its start. `ant-lightning "
            "sweep RUN --guidance 1 --extractor ant_lightning.ShapesFeatures` scores colour images "
            "without them"
        )
    return "no validation with scores has ended"


def sweep_section(folder: Path) -> str:
    """The rows of `sweep.jsonl` and the picture of the last sweep."""
    path = folder / "sweep.jsonl"
    if not path.is_file():
        return ""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = [name for name in _SWEPT if any(name in row["scores"] for row in rows)]
    cells = [
        [row["step"], f"{row['guidance_scale']:g}"]
        + ["" if row.get("ema_length") is None else f"{row['ema_length']:g}"]
        + [f"{row['scores'][name]:.4g}" if name in row["scores"] else "" for name in names]
        + [row["extractor"]]
        for row in rows
    ]
    heads = ["step", "guidance", "EMA length", *names, "features"]
    shown = "![the last sweep](sweep.png)\n\n" if (folder / "sweep.png").is_file() else ""
    return (
        f"## Sweeps\n\n{shown}Every row of [sweep.jsonl](sweep.jsonl), which also has the other "
        f"scores. Scores of different features cannot be compared.\n\n{table(heads, *cells)}"
    )


def diagnosis_section(folder: Path) -> str:
    """What `diagnose` advised, and where its page is."""
    path = folder / "diagnosis.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text())
    lines = "".join(f"1. {each['title']}\n" for each in found.get("advice", []))
    return (
        f"## Would balancing help?\n\nMeasured at step {found['step']}; reasons, evidence and "
        f"tables are in [diagnosis.html](diagnosis.html) ([Markdown](diagnosis.md), "
        f"[numbers](diagnosis.json)).\n\n{lines}"
    )
