"""What is measured early, against which method helps."""

import json
import math

import pytest

from studies.predictors import (
    METHODS,
    PREDICTORS,
    correlation_table,
    early_numbers,
    main,
    rank_correlation,
)

SETTINGS = [f"setting{i}" for i in range(8)]


def diagnosis(lowest=-0.5, conflicts=((0, 2),)):
    return {
        "tasks": {
            "loss": [1.0, 0.1, 0.01],
            "gradient_share": [0.9, 0.1, 0.0],
            "cosines": [[1.0, None, lowest], [None, 1.0, 0.3], [lowest, 0.3, 1.0]],
            "conflicts": [list(pair) for pair in conflicts],
        },
        "distance_correlation": {"log-SNR": -0.6, "timestep": -0.5},
    }


def test_the_numbers_of_a_diagnosis():
    assert early_numbers(diagnosis()) == pytest.approx(
        {
            "conflicts": 1 / 3,
            "lowest_cosine": -0.5,
            "distance": -0.6,
            "loss_spread": 2.0,
            "gradient_spread": math.log10(0.9e6),
        }
    )


def test_the_interval_of_a_rank_correlation_is_bonett_and_wrights():
    x, y = [1, 2, 3, 4, 5, 6, 7], [2, 1, 4, 3, 7, 6, 5]
    r, low, high, p = rank_correlation(x, y)
    assert r == pytest.approx(1 - 6 * 12 / (7 * 48))  # the differences of ranks: 4 of 1, 2 of 2
    half = 1.96 * ((1 + r**2 / 2) / 4) ** 0.5
    assert math.atanh(low) == pytest.approx(math.atanh(r) - half)
    assert math.atanh(high) == pytest.approx(math.atanh(r) + half)
    assert 0 < p < 0.05
    assert rank_correlation([1, 2, 3, 4], [1, 2, 3, 4])[:3] == (1, 1, 1)
    assert math.isnan(rank_correlation([1, 1, 1, 1], [1, 2, 3, 4])[0])


def test_only_what_is_there_is_detected_and_few_settings_give_nothing():
    early = {
        setting: dict.fromkeys(PREDICTORS, 0.0) | {"loss_spread": i, "distance": (i * 5) % 8}
        for i, setting in enumerate(SETTINGS)
    }
    found = {setting: {"uw": -0.1 * i} for i, setting in enumerate(SETTINGS)}
    for setting in SETTINGS[:4]:
        found[setting]["nash"] = 0.0
    table, kept = correlation_table(early, found)
    assert kept == ["log10 of highest / lowest task loss for uw"]
    lines = {line[0]: line[1:] for line in table.rows}
    assert lines[PREDICTORS["loss_spread"]] == ["-1.00 [-1.00, -1.00]", "", ""]
    assert lines[PREDICTORS["conflicts"]][0] == "the same in all settings"
    assert table.columns[1:] == [
        f"{m} ({n} settings)" for m, n in zip(METHODS, (8, 4, 0), strict=True)
    ]


def test_the_section_says_what_rows_say(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    settings = ["dit", "cosine_eps", "cosine_v", "linear_eps", "linear_v"]
    early = [
        {"cell": f"early/{s}", "files": {"diagnosis.json": diagnosis(-0.1 * i)}}
        for i, s in enumerate(settings)
    ]
    (results / "curves.jsonl").write_text("".join(json.dumps(row) + "\n" for row in early))
    compare, evidence = [], []
    for i, setting in enumerate(settings):
        for method, fid in {"vanilla": 4.0, "uw": 4.0 * (1 - 0.1 * i)}.items():
            scores = {"scores": {"fid": fid}}
            if setting == "dit":
                compare.append({"method": method, "seed": 0, **scores})
            else:
                files = {"generation_metrics.jsonl": [scores]}
                evidence.append({"cell": f"{setting}/seed0/{method}", "files": files})
    for name, rows in {"compare": compare, "evidence": evidence}.items():
        (results / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "results.md").write_text(
        "before\n<!-- predictors: begin -->\nold\n<!-- predictors: end -->\nafter\n"
    )
    assert main([f"--docs={tmp_path}"]) == 0
    text = (tmp_path / "results.md").read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "these are detected: lowest cosine of two tasks for uw." in text
    assert "| linear_v | 0.33 | -0.40 |" in text
    assert text.count("-40%") == 1
    assert (results / "predictors.png").stat().st_size > 10_000
