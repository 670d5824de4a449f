"""`python -m studies.predictors`: does anything measured early predict which method helps?

Each setting is a model and a process. What is measured: a diagnosis after a tenth of a vanilla run
(cells `early/...` of studies/curves.yaml). What is predicted: the mean over seeds of
`log(FID of a method / FID of vanilla)` at the end of the runs, from docs/results.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from scipy import stats

from ant_lightning.files.atomic import write_figure
from studies.curves_tables import CurveRows
from studies.results import read_rows
from studies.section import replace_section
from studies.statistics import holm
from studies.text_table import TextTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

__all__ = ["early_numbers", "main", "rank_correlation"]

# By the direction of a label from its point: its horizontal and vertical alignment.
_ALIGNED = {1: ("left", "bottom"), -1: ("right", "top"), 0: ("center", "center")}
METHODS = ("uw", "nash", "pcgrad")
# Name -> what the heads of table and picture say.
PREDICTORS = {
    "conflicts": "share of conflicting pairs of tasks",
    "lowest_cosine": "lowest cosine of two tasks",
    "distance": "correlation of affinity with distance in log-SNR",
    "loss_spread": "log10 of highest / lowest task loss",
    "gradient_spread": "log10 of highest / lowest gradient share",
}


def early_numbers(diagnosis: Mapping[str, Any]) -> dict[str, float]:
    """The predictors, from a `diagnosis.json`."""
    tasks = diagnosis["tasks"]
    k = len(tasks["loss"])
    cosines = [c for c in chain(*tasks["cosines"]) if c is not None]
    # A share of 0 is one that noise hides.
    shares = [max(share, 1e-6) for share in tasks["gradient_share"]]
    return {
        "conflicts": len(tasks["conflicts"]) / math.comb(k, 2),
        "lowest_cosine": min(cosines),
        "distance": diagnosis["distance_correlation"]["log-SNR"],
        "loss_spread": math.log10(max(tasks["loss"]) / min(tasks["loss"])),
        "gradient_spread": math.log10(max(shares) / min(shares)),
    }


def gains(results: Path) -> dict[str, dict[str, float]]:
    """By setting and method, the mean of `log(FID / FID of vanilla of the same seed)`."""
    fids: dict[str, dict[str, dict[Any, float]]] = {}
    curves = CurveRows.of({row["cell"]: row for row in read_rows(results / "curves.jsonl")})
    for setting in ("ldm", "adm", "sit", "shapes_ldm", "shapes_adm"):
        for method in curves.methods(f"{setting}/snr"):
            found = curves.last(f"{setting}/snr", method)
            fids.setdefault(setting, {})[method] = {s: each["fid"] for s, each in found.items()}
    for method in ("vanilla", "uw"):
        found = curves.last("ldm/why", f"{method}_v")
        fids.setdefault("ldm_v", {})[method] = {s: each["fid"] for s, each in found.items()}
    for row in read_rows(results / "compare.jsonl"):
        fids.setdefault("dit", {}).setdefault(row["method"], {})[row["seed"]] = row["scores"]["fid"]
    for row in read_rows(results / "evidence.jsonl"):
        if row["cell"].count("/") == 2 and "/seed" in row["cell"]:
            setting, seed, method = row["cell"].split("/")
            scores = row["files"]["generation_metrics.jsonl"][-1]["scores"]
            fids.setdefault(setting, {}).setdefault(method, {})[seed] = scores["fid"]
    return {
        setting: {
            method: statistics.mean(
                math.log(fid / methods["vanilla"][seed])
                for seed, fid in seeds.items()
                if seed in methods["vanilla"]
            )
            for method, seeds in methods.items()
            if method in METHODS and seeds.keys() & methods["vanilla"].keys()
        }
        for setting, methods in fids.items()
        if "vanilla" in methods
    }


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float, float]:
    """Spearman's correlation, its 95% interval and p-value; NaN if a sequence is constant.

    `tanh(atanh(r) ± 1.96 sqrt((1 + r² / 2) / (n - 3)))`.

    Reference: Bonett and Wright, "Sample Size Requirements for Estimating Pearson, Kendall and
    Spearman Correlations", Psychometrika 65, 2000.
    """
    if len(set(x)) == 1 or len(set(y)) == 1:
        return math.nan, math.nan, math.nan, 1.0
    result = stats.spearmanr(x, y)
    r = float(result.statistic)
    if abs(r) >= 1:
        return r, r, r, float(result.pvalue)
    half = 1.96 * math.sqrt((1 + r**2 / 2) / (len(x) - 3))
    return (
        r,
        math.tanh(math.atanh(r) - half),
        math.tanh(math.atanh(r) + half),
        float(result.pvalue),
    )


def correlation_table(
    early: Mapping[str, Mapping[str, float]], found: Mapping[str, Mapping[str, float]]
) -> tuple[TextTable, list[str]]:
    """Correlations of predictors with gains over the settings, and those that survive Holm."""
    rows, names, p_values = [], [], []
    for name, words in PREDICTORS.items():
        line = [words]
        for method in METHODS:
            settings = [s for s in early if method in found.get(s, {})]
            if len(settings) < 5:
                line.append("")
                continue
            x, y = [early[s][name] for s in settings], [found[s][method] for s in settings]
            r, low, high, p = rank_correlation(x, y)
            constant = "the same in all settings"
            line.append(constant if math.isnan(r) else f"{r:+.2f} [{low:+.2f}, {high:+.2f}]")
            names.append(f"{words} for {method}")
            p_values.append(p)
        rows.append(line)
    kept = [n for n, p in zip(names, holm(p_values), strict=True) if p < 0.05]
    counts = [sum(m in found.get(s, {}) for s in early) for m in METHODS]
    heads = [f"{m} ({count} settings)" for m, count in zip(METHODS, counts, strict=True)]
    title = "Rank correlation with log(FID / FID of vanilla)"
    return TextTable(title, ["measured after a tenth of vanilla training", *heads], rows), kept


def scatter(
    early: Mapping[str, Mapping[str, float]], found: Mapping[str, Mapping[str, float]]
) -> Figure:
    """Change of FID against each predictor; one point for each setting."""
    figure = Figure(figsize=(13, 5.6), dpi=110, layout="constrained")
    panels = figure.subplots(2, len(PREDICTORS), sharey="row", sharex="col")
    for row, method in zip(panels, METHODS[:2], strict=True):
        for axis, (name, words) in zip(row, PREDICTORS.items(), strict=True):
            for setting, values in early.items():
                if method in found.get(setting, {}):
                    place = values[name], 100 * math.expm1(found[setting][method])
                    axis.plot(*place, "o", color="tab:blue", markersize=4, label=setting)
            axis.axhline(0, color="0.5", linewidth=0.8)
            axis.margins(x=0.4, y=0.12)
            axis.grid(alpha=0.3)
            if axis in panels[-1]:
                axis.set_xlabel(words.replace(" of ", "\nof ", 1), fontsize=8)
        row[0].set_ylabel(f"{method}: change of FID (%)", fontsize=9)
    figure.suptitle("Below 0 the method has a lower FID than vanilla", fontsize=10)
    figure.draw_without_rendering()  # fixes the size of the panels
    for axis in panels.flat:
        _label_points(axis)
    return figure


def _label_points(axis: Axes) -> None:
    """Write each line's label beside its point, where it meets no other point or label."""
    named = [(str(line.get_label()), np.asarray(line.get_xydata())) for line in axis.lines]
    points = [(name, data[0]) for name, data in named if not name.startswith("_")]
    if not points:
        return
    taken = [
        Bbox.from_bounds(x - 4, y - 4, 8, 8)
        for x, y in axis.transData.transform(np.stack([place for _, place in points]))
    ]
    for label, place in points:
        text = axis.annotate(
            label, (place[0], place[1]), xytext=(0, 0), textcoords="offset points", fontsize=7
        )
        options = []
        for distance, x, y in product((4, 12, 20), (1, -1, 0), (1, -1, 0)):
            text.set(ha=_ALIGNED[x][0], va=_ALIGNED[y][1], position=(distance * x, distance * y))
            box = text.get_window_extent()
            outside = not all(axis.bbox.contains(*corner) for corner in (box.min, box.max))
            options.append((box.count_overlaps(taken) + outside, distance, -x, -y))
        _, distance, x, y = min(options)
        text.set(ha=_ALIGNED[-x][0], va=_ALIGNED[-y][1], position=(-distance * x, -distance * y))
        taken.append(text.get_window_extent())


def main(args: Sequence[str] | None = None) -> int:
    """Write the section and the picture."""
    parser = argparse.ArgumentParser(prog="python -m studies.predictors")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    settings = parser.parse_args(args)
    results: Path = settings.docs / "results"
    rows = read_rows(results / "curves.jsonl")
    early = {
        row["cell"].removeprefix("early/"): early_numbers(row["files"]["diagnosis.json"])
        for row in rows
        if row["cell"].startswith("early/")
    }
    if not early:
        print(f"predictors: no early/ cell in {results / 'curves.jsonl'}")
        return 1
    found = gains(results)
    table, kept = correlation_table(early, found)
    write_figure(results / "predictors.png", scatter(early, found))
    answer = (
        f"After Holm's correction these are detected: {', '.join(kept)}."
        if kept
        else "No correlation survives Holm's correction; with so few settings only a very "
        "strong one could."
    )
    numbers = TextTable(
        "What was measured",
        ["setting", *PREDICTORS.values(), *(f"{m}: change of FID" for m in METHODS)],
        [
            [s, *(f"{values[name]:.2f}" for name in PREDICTORS)]
            + [
                f"{100 * math.expm1(found[s][m]):+.0f}%" if m in found.get(s, {}) else ""
                for m in METHODS
            ]
            for s, values in early.items()
        ],
    )
    text = f"{answer}\n\n![predictors.png](results/predictors.png)\n\n"
    text += "\n".join(f"### {t.title}\n\n{t.markdown()}" for t in (table, numbers))
    replace_section(settings.docs / "results.md", "predictors", text)
    print(json.dumps({"settings": list(early), "detected": kept}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
