"""`python -m studies.evidence`: tables and figures of the evidence study, from rows.

Everything is compared with vanilla over the same seeds. The primary outcome is the log of the
excess risk of each cluster, so a difference is a ratio; Holm's correction is over all methods and
clusters of a setting.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant_lightning.files.atomic import write_figure, write_text
from studies.evidence_figure import convergence_figure, ratio_figure
from studies.results import finished_rows
from studies.section import replace_section, where_it_ran
from studies.statistics import (
    PairedDifference,
    difference_text,
    holm,
    mean_and_spread,
    paired_difference,
)
from studies.study import Study
from studies.text_table import TextTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["EvidenceRows", "main"]

# The question that each pair answers.
CONTRASTS = {
    ("uw", "frozen_uw"): "does it matter that UW's weights are learned while training?",
    ("uw", "linear"): "UW's weights against equal ones",
    ("continuous_uw", "uw"): "every noise level a task of its own",
    ("pcgrad", "linear"): "projection, on the same batches",
    ("pcgrad", "placebo"): "does it matter which timesteps share a task?",
    ("nash", "linear"): "bargaining weights, on the same batches",
}


@dataclass(frozen=True)
class EvidenceRows:
    """Measurements of finished cells: `runs[cell name]` is what the cell collected.

    Attributes:
        runs: By name of cell, `{"excess": rows, "scores": rows}`.
    """

    runs: Mapping[str, Mapping[str, list[dict[str, Any]]]]

    @classmethod
    def of(cls, rows: Mapping[str, Mapping[str, Any]]) -> EvidenceRows:
        """From the rows of the study, without cells that measure nothing."""
        return cls(
            {
                name: {
                    "excess": row["files"]["excess_risk.jsonl"],
                    "scores": row["files"]["generation_metrics.jsonl"],
                }
                for name, row in rows.items()
                if "generation_metrics.jsonl" in row["files"]
            }
        )

    def seeds(self, group: str) -> list[str]:
        """Folders of the seeds of a group, such as `cosine_eps/seed0`."""
        found = {name.rpartition("/")[0] for name in self.runs}
        return sorted(seed for seed in found if seed.rpartition("/seed")[0] == group)

    def methods(self, group: str) -> list[str]:
        """Methods of a group, vanilla first, in the order of the study."""
        seeds = self.seeds(group)
        found = [n.rpartition("/")[2] for n in self.runs if n.rpartition("/")[0] in seeds]
        return sorted(dict.fromkeys(found), key=lambda method: method != "vanilla")

    def paired(self, group: str, methods: tuple[str, str]) -> list[tuple[str, str]]:
        """Names of the runs of two methods, for every seed that has both."""
        pairs = [(f"{seed}/{methods[0]}", f"{seed}/{methods[1]}") for seed in self.seeds(group)]
        return [pair for pair in pairs if pair[0] in self.runs and pair[1] in self.runs]

    def log_ratios(self, group: str, methods: tuple[str, str]) -> list[list[float]]:
        """Log of the ratio of the final excess risks, `[pairs][clusters]`."""
        return self.log_ratios_of(self.paired(group, methods))

    def log_ratios_of(self, pairs: Iterable[tuple[str, str]]) -> list[list[float]]:
        """As `log_ratios`, of pairs of names of runs."""
        return [
            [
                math.log(a / b)
                for a, b in zip(
                    *(self.runs[name]["excess"][-1]["tasks"]["excess"] for name in pair),
                    strict=True,
                )
            ]
            for pair in pairs
        ]

    def scores(self, name: str) -> dict[str, float]:
        """The final scores of a run."""
        scores: dict[str, float] = self.runs[name]["scores"][-1]["scores"]
        return scores


def cluster_differences(
    rows: EvidenceRows, group: str, *, base: str = "vanilla"
) -> tuple[dict[tuple[str, int], PairedDifference], dict[tuple[str, int], float]]:
    """Difference of log excess risk to `base` by (method, cluster), and adjusted p-values."""
    found: dict[tuple[str, int], PairedDifference] = {}
    for method in rows.methods(group):
        ratios = rows.log_ratios(group, (method, base))
        if method != base and len(ratios) > 1:
            for task, values in enumerate(zip(*ratios, strict=True)):
                found[method, task] = paired_difference(values)
    adjusted = holm([each.p_value for each in found.values()])
    return found, dict(zip(found, adjusted, strict=True))


def percent(difference: PairedDifference, adjusted: float | None = None) -> str:
    """A difference of logs as a change in per cent, with its interval and if it is detected."""
    mean, low, high = (100 * math.expm1(v) for v in difference[:3])
    text = f"{mean:+.1f}% [{low:+.1f}, {high:+.1f}]"
    if not difference.detected:
        return f"{text}, no detectable difference"
    return f"{text} **" if adjusted is not None and adjusted < 0.05 else text


def risk_table(rows: EvidenceRows, group: str) -> TextTable:
    """Excess risk of each method and cluster against vanilla; `**` survives Holm's correction."""
    found, adjusted = cluster_differences(rows, group)
    methods = list(dict.fromkeys(method for method, _ in found))
    num_tasks = 1 + max((task for _, task in found), default=-1)
    body = [
        [m, *(percent(found[m, task], adjusted[m, task]) for task in range(num_tasks))]
        for m in methods
    ]
    heads = ["method", *(f"cluster {task}" for task in range(num_tasks))]
    return TextTable(f"Excess risk against vanilla, {group}", heads, body)


def score_table(rows: EvidenceRows, group: str) -> TextTable:
    """FID and KID of each method, with the FID of real against real images."""
    body = []
    for method in rows.methods(group):
        names = [f"{seed}/{method}" for seed in rows.seeds(group)]
        scores = [rows.scores(name) for name in names if name in rows.runs]
        line = [method, str(len(scores))]
        for metric in ("fid", "fid_real", "kid"):
            values = [each[metric] for each in scores if metric in each]
            line.append(mean_and_spread(values, digits=4))
        pairs = rows.paired(group, (method, "vanilla"))
        line.append("" if method == "vanilla" else fid_gap(rows, pairs))
        body.append(line)
    heads = ["method", "seeds", "FID", "FID real against real", "KID"]
    return TextTable(f"Image quality, {group}", [*heads, "FID - vanilla, paired [95%]"], body)


def fid_gap(rows: EvidenceRows, pairs: Sequence[tuple[str, str]]) -> str:
    """Difference of FID over pairs of runs; empty for fewer than two."""
    gaps = [rows.scores(a)["fid"] - rows.scores(b)["fid"] for a, b in pairs]
    return difference_text(gaps, digits=4)


def bound_table(rows: EvidenceRows, group: str) -> TextTable:
    """UW with each `min_loss` against UW with the default and against vanilla, seeds paired."""
    setting, body = group.removeprefix("min_loss/"), []
    for level in sorted(rows.methods(group), key=float):
        names = [f"{seed}/{level}" for seed in rows.seeds(group) if f"{seed}/{level}" in rows.runs]
        fids = [rows.scores(name)["fid"] for name in names]
        line = [level, str(len(names)), f"{statistics.mean(fids):.4f}"]
        for base in ("uw", "vanilla"):
            others = [
                f"{name.removeprefix('min_loss/').rpartition('/')[0]}/{base}" for name in names
            ]
            pairs = [pair for pair in zip(names, others, strict=True) if pair[1] in rows.runs]
            ratios = [statistics.mean(each) for each in rows.log_ratios_of(pairs)]
            line += [fid_gap(rows, pairs), percent(paired_difference(ratios)) if ratios[1:] else ""]
        body.append(line)
    heads = ["min_loss", "seeds", "FID", "FID - UW's", "excess risk against UW"]
    heads += ["FID - vanilla's", "excess risk against vanilla"]
    return TextTable(f"UW's bound, {setting}: excess risk is the mean of clusters", heads, body)


def contrast_table(rows: EvidenceRows, groups: Iterable[str]) -> TextTable:
    """Pairs of methods: the mean over clusters of the log ratio of excess risks."""
    body, raw = [], []
    for group in groups:
        for pair, question in CONTRASTS.items():
            ratios = [statistics.mean(each) for each in rows.log_ratios(group, pair)]
            if len(ratios) > 1:
                raw.append(paired_difference(ratios))
                body.append([group, f"{pair[0]} against {pair[1]}", question])
    adjusted = holm([each.p_value for each in raw])
    for line, difference, p in zip(body, raw, adjusted, strict=True):
        line.append(percent(difference, p))
    heads = ["setting", "pair", "question", "excess risk, geometric mean of clusters"]
    return TextTable("Contrasts", heads, body)


def findings(rows: EvidenceRows, groups: Sequence[str]) -> str:
    """Sentences: where a method is worse than vanilla, where better, and where neither."""
    lines = []
    for group in groups:
        found, adjusted = cluster_differences(rows, group)
        if not found:
            continue
        kept = {key: d for key, d in found.items() if d.detected and adjusted[key] < 0.05}
        for said, sign in (("higher (worse)", 1), ("lower (better)", -1)):
            which = [f"{m} in cluster {t}" for (m, t), d in kept.items() if sign * d.mean > 0]
            lines.append(
                f"* {group}: excess risk {said} than vanilla's after Holm's correction: "
                f"{', '.join(which) or 'none'}."
            )
        lines.append(
            f"* {group}: {len(found) - len(kept)} of {len(found)} pairs of method and cluster show "
            "no difference that survives the correction."
        )
    return "\n".join(lines)


def section(rows: Mapping[str, Mapping[str, Any]], pictures: Sequence[str], *, total: int) -> str:
    """The whole section of docs/results.md, of a study of `total` cells."""
    measured = EvidenceRows.of(rows)
    groups = sorted({name.rpartition("/seed")[0] for name in measured.runs}, key=_place)
    settings = [g for g in groups if not g.startswith(("width/", "min_loss/"))]
    steps = {row["excess"][-1]["step"] for row in measured.runs.values()}
    text = [
        "## The evidence",
        "",
        f"`make evidence`: {where_it_ran(rows, total=total)}; "
        f"{', '.join(map(str, sorted(steps)))} steps. Excess risk is the distance to the exact "
        "denoiser (see `ExcessRisk`), the same images and noise for all; seeds are paired; the "
        "learning rate of every method was tuned on a seed of its own. Intervals are 95%; ** "
        "survives Holm's correction over the methods and clusters of a setting. Cluster 0 has the "
        "least noise.",
        "",
        findings(measured, settings),
        "",
    ]
    text += [line for name in pictures for line in (f"![{name}](results/{name})", "")]
    bounds = [g for g in groups if g.startswith("min_loss/")]
    tables = [t(measured, g) for g in groups if g not in bounds for t in (risk_table, score_table)]
    tables += [bound_table(measured, g) for g in bounds]
    for table in [contrast_table(measured, settings), *tables]:
        if table.rows:
            text += [f"### {table.title}", "", table.markdown(), ""]
    return "\n".join(text).rstrip() + "\n"


def _place(group: str) -> tuple[bool, bool, str]:
    return group.startswith("min_loss/"), group.startswith("width/"), group


def main(args: Sequence[str] | None = None) -> int:
    """Write the section, the figures and the rows."""
    parser = argparse.ArgumentParser(prog="python -m studies.evidence")
    parser.add_argument("--study", type=Path, default=Path("studies/evidence.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    settings = parser.parse_args(args)
    study = Study.read(settings.study)
    rows = finished_rows(study, settings.folder / "results.jsonl")
    measured = EvidenceRows.of(rows)
    if not measured.runs:
        print(f"evidence: no finished run in {settings.folder}")
        return 1
    results: Path = settings.docs / "results"
    results.mkdir(parents=True, exist_ok=True)
    pictures = []
    for group in sorted({name.rpartition("/seed")[0] for name in measured.runs}):
        if group.startswith(("width/", "min_loss/")):
            continue
        found, _ = cluster_differences(measured, group)
        curves = {
            method: [
                measured.runs[f"{seed}/{method}"]
                for seed in measured.seeds(group)
                if f"{seed}/{method}" in measured.runs
            ]
            for method in measured.methods(group)
        }
        figures = {"convergence": convergence_figure(curves, title=group)}
        if found:
            figures["ratios"] = ratio_figure(found, title=group)
        for kind, figure in figures.items():
            name = f"evidence_{group}_{kind}.png"
            write_figure(results / name, figure)
            pictures.append(name)
    lines = (json.dumps(row) + "\n" for row in rows.values())
    write_text(results / "evidence.jsonl", "".join(lines))
    page: Path = settings.docs / "results.md"
    replace_section(page, "evidence", section(rows, pictures, total=len(study.cells)))
    print(f"{len(measured.runs)} measured runs in {page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
