"""Tables of the curves study: scores, steps to a FID, contrasts, tuning and losses by task."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from studies.statistics import difference_text, holm, mean_and_spread, paired_difference
from studies.text_table import TextTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "METRICS",
    "TASKS",
    "TITLES",
    "CurveRows",
    "contrast_table",
    "guidance_table",
    "profile_table",
    "score_table",
    "steps_table",
    "steps_to",
    "tasks_table",
    "tuning_table",
]

METRICS = ("fid", "kid", "precision", "recall", "class_agreement")
TITLES = {
    "ldm/snr": "latent diffusion",
    "ldm/four_times": "latent diffusion, four times the steps",
    "ldm/why": "latent diffusion, one thing changed",
    "ldm/timestep": "latent diffusion, timestep clusters",
    "ldm/gradient": "latent diffusion, gradient clusters",
    "adm/snr": "pixels (ADM)",
    "sit/snr": "flow matching (SiT)",
    "dit/learned_variance": "pixels (DiT), learned variance",
    "dit/fixed_variance": "pixels (DiT), fixed variance",
    "shapes_ldm/snr": "shapes, latent diffusion",
    "shapes_adm/snr": "shapes, pixels (ADM)",
    "shapes_dit/learned_variance": "shapes, pixels (DiT), learned variance",
    "shapes_dit/fixed_variance": "shapes, pixels (DiT), fixed variance",
}
# Pairs of methods, by group, and the question that each answers.
CONTRASTS = {
    ("ldm/snr", "uw", "frozen_uw"): "does it matter that UW's weights are learned while training?",
    ("ldm/snr", "uw", "linear"): "UW's weights against equal ones",
    ("ldm/snr", "uw", "placebo"): "does it matter which timesteps share a task?",
    ("ldm/snr", "uw", "min_snr"): "against a published fixed weighting",
    ("ldm/snr", "continuous_uw", "uw"): "every noise level a task of its own",
    ("ldm/snr", "pcgrad", "linear"): "projection, on the same batches",
    ("ldm/snr", "nash", "linear"): "bargaining weights, on the same batches",
    ("ldm/why", "uw_v", "vanilla_v"): "UW with v-prediction",
    ("ldm/why", "vanilla_v", "uw"): "v-prediction without a balancer against UW",
    ("ldm/why", "uw_ema_0.99", "vanilla_ema_0.99"): "UW with a moving average of 100 steps",
    ("ldm/why", "uw_scale_0.5", "vanilla_scale_0.5"): "UW with latents of half the scale",
}
# Trained models that draw with other scales of guidance than the one of their training's metrics.
GUIDANCE, TRAINING_GUIDANCE = "ldm/guidance/", 1.5
# UW with another number of clusters; the main group has MAIN_TASKS.
TASKS, MAIN_TASKS = "ldm/tasks", 5
# Groups whose runs have another length than the model's main group.
OTHER_LENGTH = ("ldm/four_times",)


@dataclass(frozen=True)
class CurveRows:
    """Measurements of finished cells.

    Attributes:
        curves: By `model/group`, method and seed, the rows of `generation_metrics.jsonl`.
    """

    curves: Mapping[str, Mapping[str, Mapping[int, list[dict[str, Any]]]]]

    @classmethod
    def of(cls, rows: Mapping[str, Mapping[str, Any]]) -> CurveRows:
        """From the rows of the study, without those of tuning and of real images."""
        found: dict[str, dict[str, dict[int, list[dict[str, Any]]]]] = {}
        for name, row in rows.items():
            run, _, seed = name.rpartition("/seed")
            measured = row["files"].get("generation_metrics.jsonl")
            if measured and run and not name.startswith("tune/"):
                group, _, method = run.rpartition("/")
                found.setdefault(group, {}).setdefault(method, {})[int(seed)] = measured
        return cls(found)

    def methods(self, group: str) -> list[str]:
        """Methods of a group, in the order of the study."""
        return list(self.curves.get(group, {}))

    def last(self, group: str, method: str) -> dict[int, dict[str, float]]:
        """The final scores of each seed."""
        runs = self.curves.get(group, {}).get(method, {})
        return {seed: rows[-1]["scores"] for seed, rows in runs.items()}

    def base(self, group: str, method: str = "vanilla") -> dict[int, list[dict[str, Any]]]:
        """The runs that a group is compared with: its own, or those of the model's main group."""
        own = self.curves.get(group, {}).get(method)
        if own or group in OTHER_LENGTH:
            return dict(own or {})
        return dict(self.curves.get(f"{group.partition('/')[0]}/snr", {}).get(method, {}))

    def curve(self, group: str, method: str, metric: str) -> tuple[list[int], list[list[float]]]:
        """Steps `[m]` and the values of all seeds `[seeds][m]`."""
        runs = list(self.curves[group][method].values())
        steps = [row["step"] for row in runs[0]]
        return steps, [[row["scores"][metric] for row in run] for run in runs]


def steps_to(fid: float, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Steps after which a run first has this FID, or `None` if it never has.

    Between two measurements log FID is linear in the step.
    """
    before: tuple[float, float] | None = None
    for row in rows:
        step, value = float(row["step"]), float(row["scores"]["fid"])
        if value <= fid:
            if before is None or before[1] == value:
                return step
            part = math.log(before[1] / fid) / math.log(before[1] / value)
            return before[0] + part * (step - before[0])
        before = step, value
    return None


def score_table(rows: CurveRows, group: str, real: Mapping[str, float]) -> TextTable:
    """Final scores of each method, and the difference of FID to vanilla of the same seeds."""
    base = {seed: run[-1]["scores"]["fid"] for seed, run in rows.base(group).items()}
    lines, gaps = [], {}
    for method in rows.methods(group):
        scores = rows.last(group, method)
        line = [method, str(len(scores))]
        line += [mean_and_spread([s[m] for s in scores.values()], digits=3) for m in METRICS]
        if method != "vanilla":
            gaps[method] = [s["fid"] - base[seed] for seed, s in scores.items() if seed in base]
        lines.append(line)
    judged = {m: paired_difference(each) for m, each in gaps.items() if len(each) > 1}
    adjusted = dict(zip(judged, holm([d.p_value for d in judged.values()]), strict=True))
    for line in lines:
        text = difference_text(gaps.get(line[0], []), digits=2)
        line.append(f"{text} **" if adjusted.get(line[0], 1) < 0.05 else text)
    if real:
        found = [real.get(f"{m}_real") for m in METRICS]
        lines.append(["real images", "", *("" if v is None else f"{v:.3f}" for v in found), ""])
    heads = ["method", "seeds", "FID", "KID", "precision", "recall", "class agreement"]
    title = f"Scores, {TITLES.get(group, group)}"
    return TextTable(title, [*heads, "FID - vanilla, paired [95%]"], lines)


def steps_table(rows: CurveRows, group: str) -> TextTable:
    """FID over steps, and the steps to the FID that vanilla of the same seed ends with."""
    base = rows.base(group)
    steps: list[int] = []
    lines = []
    for method in rows.methods(group):
        steps, values = rows.curve(group, method, "fid")
        line = [method, *(f"{statistics.mean(column):.2f}" for column in zip(*values, strict=True))]
        needed = [
            steps_to(base[seed][-1]["scores"]["fid"], run)
            for seed, run in rows.curves[group][method].items()
            if seed in base
        ]
        reached = [each for each in needed if each is not None]
        if method == "vanilla" or not needed:
            line.append("")
        elif len(reached) < len(needed):
            line.append(f"{len(reached)} of {len(needed)} seeds")
        else:
            spread = f" ({min(reached):.0f} to {max(reached):.0f})" if len(reached) > 1 else ""
            line.append(f"{statistics.mean(reached):.0f}{spread}")
        lines.append(line)
    heads = ["method", *(f"{step:,}" for step in steps), "steps to vanilla's last FID"]
    return TextTable(f"FID over steps, {TITLES.get(group, group)}", heads, lines)


def tasks_table(rows: CurveRows) -> TextTable:
    """UW's final scores by the number of clusters, on the seeds that every number has."""
    counts = {int(g.removeprefix(TASKS)): g for g in rows.curves if g.startswith(TASKS)}
    if not counts:
        return TextTable("", [], [])
    found = {k: rows.last(group, "uw") for k, group in (counts | {MAIN_TASKS: "ldm/snr"}).items()}
    seeds = sorted(set.intersection(*(set(each) for each in found.values())))
    lines = []
    for k, each in sorted(found.items()):
        gaps = [each[seed]["fid"] - found[MAIN_TASKS][seed]["fid"] for seed in seeds]
        scores = [mean_and_spread([each[seed][m] for seed in seeds], digits=3) for m in METRICS]
        text = difference_text(gaps, digits=2) if k != MAIN_TASKS else ""
        lines.append([str(k), str(len(seeds)), *scores, text])
    heads = ["clusters", "seeds", "FID", "KID", "precision", "recall", "class agreement"]
    title = "UW by the number of clusters, latent diffusion"
    return TextTable(title, [*heads, f"FID - FID of {MAIN_TASKS}, paired [95%]"], lines)


def contrast_table(rows: CurveRows) -> TextTable:
    """Differences of the last FID of pairs of methods, over the seeds that have both."""
    lines, found = [], []
    for (group, first, second), question in CONTRASTS.items():
        scores = [rows.last(group, m) or rows.last("ldm/snr", m) for m in (first, second)]
        gaps = [
            s["fid"] - scores[1][seed]["fid"] for seed, s in scores[0].items() if seed in scores[1]
        ]
        if len(gaps) > 1:
            found.append(paired_difference(gaps))
            text = difference_text(gaps, digits=2)
            lines.append([f"{first} against {second}", question, str(len(gaps)), text])
    for line, p in zip(lines, holm([d.p_value for d in found]), strict=True):
        line[-1] += " **" if p < 0.05 else ""
    heads = ["pair", "question", "seeds", "difference of FID, paired [95%]"]
    return TextTable("Contrasts, latent diffusion", heads, lines)


def guidance_table(rows: CurveRows) -> TextTable:
    """FID, precision and recall of trained models by the scale of guidance that they draw with.

    The last column compares the lowest mean FID of a method over the scales with vanilla's lowest.
    """
    found: dict[str, dict[float, dict[int, dict[str, float]]]] = {}
    for group in rows.curves:
        if group.startswith(GUIDANCE):
            main, method = group.removeprefix(GUIDANCE).split("/")
            trained = rows.last(f"ldm/{main}", method)
            found[method] = {TRAINING_GUIDANCE: trained} if trained else {}
            for scale in rows.methods(group):
                found[method][float(scale.removeprefix("scale"))] = rows.last(group, scale)
    scales = sorted({scale for each in found.values() for scale in each})
    lowest = {
        method: min(each.values(), key=lambda seeds: _means(seeds, "fid"))
        for method, each in found.items()
    }
    lines = []
    for method, each in found.items():
        texts = [
            " / ".join(f"{_means(each[scale], m):.2f}" for m in ("fid", "precision", "recall"))
            if scale in each
            else ""
            for scale in scales
        ]
        base = lowest.get("vanilla", {})
        gaps = [s["fid"] - base[seed]["fid"] for seed, s in lowest[method].items() if seed in base]
        texts.append("" if method == "vanilla" else difference_text(gaps, digits=2))
        lines.append([method, *texts])
    heads = ["method", *(f"{scale:g}" for scale in scales), "lowest FID - vanilla's lowest [95%]"]
    title = "FID / precision / recall by guidance scale, latent diffusion"
    return TextTable(title, heads, lines)


def _means(seeds: Mapping[int, Mapping[str, float]], metric: str) -> float:
    return statistics.mean(scores[metric] for scores in seeds.values())


def tuning_table(rows: Mapping[str, Mapping[str, Any]]) -> TextTable:
    """FID of each learning rate on the seed that is in no other table; the chosen one is bold."""
    lines, heads = [], ["model", "method"]
    for name, row in rows.items():
        choice = row["files"].get("choice.json")
        if choice:
            _, model, method = name.split("/")
            heads = ["model", "method", *choice["fid"]]
            cells = [
                f"**{fid:.2f}**" if float(lr) == choice["chosen"] else f"{fid:.2f}"
                for lr, fid in choice["fid"].items()
            ]
            lines.append([model, method, *cells])
    return TextTable("FID by learning rate, seed 100", heads, lines)


def profile_table(rows: Mapping[str, Mapping[str, Any]]) -> TextTable:
    """Held-out loss of each task as a ratio to vanilla's, seeds paired, and gradient shares."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, row in rows.items():
        if "/profile/" in name:
            _, _, method, seed = name.split("/")
            found.setdefault(method, {})[seed] = row["files"]["diagnosis.json"]["tasks"]["loss"]
    base = found.pop("vanilla", {})
    lines = []
    for method, seeds in found.items():
        ratios = [
            [math.log(a / b) for a, b in zip(losses, base[seed], strict=True)]
            for seed, losses in seeds.items()
            if seed in base
        ]
        if len(ratios) > 1:
            each = [paired_difference(column) for column in zip(*ratios, strict=True)]
            cells = [
                "{:+.1f}% [{:+.1f}, {:+.1f}]".format(*(100 * math.expm1(v) for v in d[:3]))
                for d in each
            ]
            lines.append([method, *cells])
    num_tasks = max((len(line) - 1 for line in lines), default=0)
    heads = ["method", *(f"task {i}" for i in range(num_tasks))]
    heads[1:2] = ["task 0 (least noise)"] if num_tasks else []
    return TextTable("Held-out loss against vanilla, latent diffusion", heads, lines)
