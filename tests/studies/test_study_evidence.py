"""The evidence study: its file, and a report that says what rows say."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from studies.compare import comparison
from studies.evidence import (
    EvidenceRows,
    bound_table,
    cluster_differences,
    contrast_table,
    findings,
    main,
    risk_table,
    score_table,
)
from studies.results import append_row
from studies.study import Study

ROOT = Path(__file__).resolve().parents[2]
GROUP = "cosine_eps"
# Ratio to vanilla in each of two clusters: worse in the first, nothing in the second, and so on.
EFFECTS = {"vanilla": (1, 1), "uw": (1.5, 1), "frozen_uw": (1.5, 1), "pcgrad": (0.8, 1)}


def excess(values, images):
    tasks = {"excess": values, "risk": values, "bayes": values}
    return {"images": images, "step": images, "mean": {"excess": sum(values)}, "tasks": tasks}


def study_rows(seeds=8):
    """Rows of a study in which seeds differ by much and methods by EFFECTS."""
    rng = np.random.default_rng(0)
    rows = {}
    for seed in range(seeds):
        base = np.exp(rng.normal(-4, 1, 2))  # hides every effect unless seeds are paired
        for method, effect in EFFECTS.items():
            final = [float(v) for v in base * effect * np.exp(rng.normal(0, 0.02, 2))]
            scores = {"fid": 5 + seed + 0.1 * (method == "uw"), "fid_real": 0.1, "kid": 0.01}
            rows[f"{GROUP}/seed{seed}/{method}"] = {
                "commit": "abc",
                "machine": "here",
                "seconds": [36.0],
                "files": {
                    "excess_risk.jsonl": [excess([1.0, 1.0], 10), excess(final, 20)],
                    "generation_metrics.jsonl": [{"scores": scores}] * 2,
                },
            }
    return rows


def test_a_bound_of_uw_is_compared_with_uw_and_vanilla_of_the_same_seeds():
    rows = study_rows()
    for seed in range(4):
        copied = json.loads(json.dumps(rows[f"{GROUP}/seed{seed}/uw"]))
        final = copied["files"]["excess_risk.jsonl"][-1]["tasks"]
        final["excess"] = [2 * value for value in final["excess"]]
        copied["files"]["generation_metrics.jsonl"][-1]["scores"]["fid"] -= 1
        rows[f"min_loss/{GROUP}/seed{seed}/0.1"] = copied
    (line,) = bound_table(EvidenceRows.of(rows), f"min_loss/{GROUP}").rows
    assert line[:2] == ["0.1", "4"]
    assert line[3].startswith("-1.0000 [-1.0000, -1.0000]")
    assert line[4].startswith("+100.0% [+100.0, +100.0]")
    assert line[5].startswith("-0.9000")
    assert float(line[6].split("%")[0]) == pytest.approx(2 * 1.5**0.5 * 100 - 100, abs=8)


def test_pairing_finds_what_is_there_and_claims_nothing_else():
    rows = EvidenceRows.of({**study_rows(), "tune": {"files": {"choice.json": {}}}})
    assert rows.methods(GROUP)[0] == "vanilla"
    found, adjusted = cluster_differences(rows, GROUP)
    assert math.exp(found["uw", 0].mean) == pytest.approx(1.5, rel=0.03)
    assert math.exp(found["pcgrad", 0].mean) == pytest.approx(0.8, rel=0.03)
    small = {key for key, p in adjusted.items() if p < 0.05}
    assert small == {("uw", 0), ("frozen_uw", 0), ("pcgrad", 0)}
    table = {row[0]: row[1:] for row in risk_table(rows, GROUP).rows}
    assert table["uw"][0].startswith(("+49", "+50"))
    assert table["uw"][0].endswith("**")
    assert table["pcgrad"][0].startswith(("-19", "-20"))
    assert all("no detectable difference" in cells[1] for cells in table.values())
    worse, better, rest = findings(rows, [GROUP]).splitlines()
    assert "higher (worse)" in worse
    assert worse.endswith("uw in cluster 0, frozen_uw in cluster 0.")
    assert "lower (better)" in better
    assert better.endswith("pcgrad in cluster 0.")
    assert "3 of 6 pairs" in rest


def test_contrasts_and_scores_are_paired_too():
    rows = EvidenceRows.of(study_rows())
    (contrast,) = contrast_table(rows, [GROUP]).rows  # the other pairs lack a method
    assert contrast[1] == "uw against frozen_uw"
    assert contrast[3].endswith("no detectable difference")
    scores = {row[0]: row for row in score_table(rows, GROUP).rows}
    assert scores["uw"][-1].startswith("+0.1000 [+0.1000, +0.1000]")
    assert scores["pcgrad"][-1].endswith("no detectable difference")
    assert scores["vanilla"][1] == "8"


def test_one_seed_gives_numbers_and_no_claims():
    rows = EvidenceRows.of(study_rows(seeds=1))
    assert risk_table(rows, GROUP).rows == []
    assert contrast_table(rows, [GROUP]).rows == []
    assert score_table(rows, GROUP).rows[0][2] == "5.0000"


def test_the_section_is_replaced_and_the_rest_of_the_page_stays(tmp_path):
    methods = {m: ["a", m] for m in EFFECTS}
    content = {
        "parts": {"method": methods},
        "groups": [
            {
                "cell": f"{GROUP}/seed{{seed}}/{{method}}",
                "axes": {"seed": [0, 1, 2], "method": list(EFFECTS)},
                "commands": [["@method"]],
            }
        ],
    }
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps(content))
    cells = Study.read(file).cells
    rows = study_rows(3)
    for name, row in rows.items():
        append_row(
            tmp_path / "run" / "results.jsonl", {**row, "cell": name, "hash": cells[name].hash}
        )
    docs = tmp_path / "docs"
    docs.mkdir()
    page = docs / "results.md"
    page.write_text(
        "# Before\n\n<!-- evidence: begin -->\nold\n<!-- evidence: end -->\n\n# After\n"
    )
    args = ["--study", str(file), "--folder", str(tmp_path / "run"), "--docs", str(docs)]
    assert main(args) == 0
    first = page.read_text()
    assert first.startswith("# Before")
    assert first.endswith("# After\n")
    assert "old" not in first
    assert "12 of 12 cells finished, 0.1 core-hours" in first
    assert main(args) == 0
    assert page.read_text() == first
    assert len((docs / "results" / "evidence.jsonl").read_text().splitlines()) == 12
    for kind in ("ratios", "convergence"):
        assert (docs / "results" / f"evidence_{GROUP}_{kind}.png").stat().st_size > 5000
    assert main(["--study", str(file), "--folder", str(tmp_path), "--docs", str(docs)]) == 1


def test_the_study_file_is_whole_seeds_of_the_main_setting_first(monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = list(Study.read(ROOT / "studies" / "evidence.yaml").cells.values())
    main_cells = [c for c in cells if c.name.startswith("cosine_eps/")]
    assert len(main_cells) == 8 * 9
    assert len({c.axes["method"] for c in main_cells[:9]}) == 9
    assert {c.axes["seed"] for c in main_cells[:9]} == {0}
    frozen = next(c for c in main_cells if c.axes["method"] == "frozen_uw")
    assert set(frozen.needs) == {"cosine_eps/seed0/uw", "tune/cosine_eps/frozen_uw"}
    first = {c.name.split("/")[0]: i for i, c in reversed(list(enumerate(cells)))}
    assert first["cosine_eps"] < first["width"] < first["linear_eps"]


def test_the_table_of_make_compare_pairs_seeds(monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = Study.read(ROOT / "studies" / "compare.yaml").cells
    rows = [
        {"axes": cell.axes, "files": {"generation_metrics.jsonl": [{"scores": {"fid": fid}}]}}
        for cell in cells.values()
        for fid in [
            10 * cell.axes["seed"]
            + {"uw": 0.5, "nash": cell.axes["seed"]}.get(cell.axes["method"], 0)
        ]
    ]
    table = {row[0]: row for row in comparison(rows).rows}
    assert list(table) == ["vanilla", "linear", "uw", "pcgrad", "nash"]
    assert table["vanilla"][1] == "10.000 ± 10.000"
    assert table["uw"][-1] == "+0.50 [+0.50, +0.50]"
    assert table["nash"][-1] == "+1.00 [-1.48, +3.48], no detectable difference"
