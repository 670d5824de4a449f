"""The study of curves: its file, and tables that say what rows say."""

import json
from pathlib import Path

import pytest

from studies.curves import main, section
from studies.curves_tables import (
    CurveRows,
    contrast_table,
    guidance_table,
    profile_table,
    score_table,
    steps_table,
    steps_to,
    tasks_table,
    tuning_table,
)
from studies.results import append_row
from studies.study import Study

ROOT = Path(__file__).resolve().parents[2]
# FID at 100, 200 and 400 steps; what a seed adds hides every effect unless seeds are paired.
FIDS = {"vanilla": (16.0, 8.0, 4.0), "uw": (8.0, 4.0, 3.0), "linear": (16.0, 8.0, 4.01)}


def measured(fids, factor=1.0):
    return [
        {
            "step": step,
            "scores": {"fid": factor * fid, "kid": 0.1, "precision": 0.5, "recall": 0.7}
            | {"class_agreement": 0.9},
        }
        for step, fid in zip((100, 200, 400), fids, strict=True)
    ]


def row(**files):
    return {"commit": "abc", "machine": "here", "seconds": [36.0], "files": files}


def study_rows(seeds=3):
    rows = {
        f"ldm/snr/{method}/seed{seed}": row(
            **{"generation_metrics.jsonl": measured(fids, 1 + seed + 0.001 * (method == "linear"))}
        )
        for seed in range(seeds)
        for method, fids in FIDS.items()
    }
    high = {"generation_metrics.jsonl": measured((9.0, 6.0, 5.0))}
    rows["ldm/why/vanilla_lr_0.016/seed0"] = row(**high)
    rows["ldm/four_times/uw/seed0"] = row(**high)
    rows["real"] = row(**high)
    rows["tune/ldm/uw/lr0.002"] = row(**high)
    choice = {"chosen": 0.004, "fid": {"0.002": 5.0, "0.004": 4.5}}
    rows["tune/ldm/uw"] = row(**{"choice.json": choice})
    return rows


@pytest.mark.parametrize(
    ("fid", "steps"),
    [
        (20.0, 100),
        (16.0, 100),
        (8.0, 200),
        (128**0.5, 150),
        (32**0.5, 300),
        (4.0, 400),
        (3.9, None),
    ],
)
def test_steps_to_a_fid_are_read_off_a_line_through_its_log(fid, steps):
    assert steps_to(fid, measured(FIDS["vanilla"])) == (steps and pytest.approx(steps))


def test_scores_are_paired_with_vanilla_and_real_images_stand_below():
    rows = CurveRows.of(study_rows())
    assert rows.methods("ldm/snr") == ["vanilla", "uw", "linear"]
    table = score_table(rows, "ldm/snr", {"fid_real": 1.5, "precision_real": 0.8})
    lines = {line[0]: line for line in table.rows}
    assert lines["uw"][-1].startswith("-2.00 [")  # -1, -2 and -3
    assert lines["linear"][-1].startswith("+0.02 [")
    assert lines["vanilla"][-1] == ""
    assert lines["real images"][2:5] == ["1.500", "", "0.800"]
    assert all(len(line) == len(table.columns) for line in table.rows)


def test_real_images_of_the_shapes_stand_below_their_own_group():
    rows = study_rows()
    scores = measured(FIDS["uw"])
    for each in scores:
        each["scores"]["fid_real"] = 1.25
    rows["shapes_ldm/snr/vanilla/seed0"] = row(**{"generation_metrics.jsonl": scores})
    text = section(rows, [], total=20)
    of_shapes = text.partition("### Scores, shapes, latent diffusion")[2]
    assert "| real images |  | 1.250 |" in of_shapes.partition("###")[0]
    assert text.count("| real images |  | 1.250 |") == 1


def test_a_group_without_vanilla_is_compared_with_that_of_the_main_group_of_the_same_length():
    rows = CurveRows.of(study_rows())
    assert rows.base("ldm/why") == rows.base("ldm/snr") != {}
    assert rows.base("ldm/four_times") == {}
    (line,) = steps_table(rows, "ldm/four_times").rows
    assert line[-1] == ""


def test_steps_to_vanillas_last_fid_of_the_same_seed():
    table = steps_table(CurveRows.of(study_rows()), "ldm/snr")
    lines = {line[0]: line for line in table.rows}
    assert table.columns[1:4] == ["100", "200", "400"]
    assert lines["uw"][1:] == ["16.00", "8.00", "6.00", "200 (200 to 200)"]
    assert lines["linear"][-1] == "0 of 3 seeds"


def test_one_seed_has_no_interval():
    rows = CurveRows.of(study_rows(seeds=1))
    steps = {line[0]: line[-1] for line in steps_table(rows, "ldm/snr").rows}
    scores = {line[0]: line[-1] for line in score_table(rows, "ldm/snr", {}).rows}
    assert steps["uw"] == "200"
    assert scores["uw"] == "-1.00, one seed"


def test_numbers_of_clusters_are_compared_on_the_seeds_that_all_have():
    rows = study_rows()
    for k, factor, seeds in ((2, 2.0, (1, 2)), (8, 0.5, (0, 1))):
        for seed in seeds:
            scores = measured(FIDS["uw"], factor * (1 + seed))
            rows[f"ldm/tasks{k}/uw/seed{seed}"] = row(**{"generation_metrics.jsonl": scores})
    table = tasks_table(CurveRows.of(rows))
    assert [line[:3] for line in table.rows] == [
        ["2", "1", "12.000"],
        ["5", "1", "6.000"],
        ["8", "1", "3.000"],
    ]
    assert [line[-1] for line in table.rows] == ["+6.00, one seed", "", "-3.00, one seed"]
    assert tasks_table(CurveRows.of(study_rows())).rows == []


def test_contrasts_are_paired():
    (line,) = contrast_table(CurveRows.of(study_rows())).rows
    assert line[0] == "uw against linear"
    assert line[2:] == ["3", "-2.02 [-4.53, +0.48], no detectable difference"]
    assert contrast_table(CurveRows.of(study_rows(seeds=1))).rows == []


def test_scales_of_guidance_stand_beside_that_of_the_training():
    rows = study_rows(seeds=2)
    for method, factor in {"vanilla": 0.25, "uw": 1.0}.items():
        for scale in ("1.0", "2.0"):
            for seed in range(2):
                scores = measured(FIDS[method], factor * (1 + seed + float(scale)))
                name = f"ldm/guidance/snr/{method}/scale{scale}/seed{seed}"
                rows[name] = row(**{"generation_metrics.jsonl": scores[-1:]})
    table = guidance_table(CurveRows.of(rows))
    assert table.columns[:4] == ["method", "1", "1.5", "2"]
    vanilla, uw = table.rows
    assert vanilla[1:] == [f"{fid} / 0.50 / 0.70" for fid in ("2.50", "6.00", "3.50")] + [""]
    assert uw[1:4] == [f"{fid} / 0.50 / 0.70" for fid in ("7.50", "4.50", "10.50")]
    assert uw[4].startswith("+2.00 [")  # UW at 1.5 (3 and 6) less vanilla at 1 (2 and 3)
    assert "### Scores, ldm/guidance" not in section(rows, [], total=20)


def test_chosen_learning_rates_are_marked_and_losses_are_ratios():
    (line,) = tuning_table(study_rows()).rows
    assert line == ["ldm", "uw", "5.00", "**4.50**"]
    rows = {
        f"ldm/profile/{method}/seed{seed}": row(
            **{"diagnosis.json": {"tasks": {"loss": [factor * (1 + seed), 2.0]}}}
        )
        for method, factor in {"vanilla": 1.0, "uw": 1.1}.items()
        for seed in range(3)
    }
    (line,) = profile_table(rows).rows
    assert line == ["uw", "+10.0% [+10.0, +10.0]", "+0.0% [+0.0, +0.0]"]


def test_the_section_is_replaced_and_the_rest_of_the_page_stays(tmp_path):
    groups = [
        {
            "cell": "ldm/snr/{method}/seed{seed}",
            "axes": {"seed": [0, 1], "method": list(FIDS)},
            "commands": [["fit", "{method}{seed}"]],
            "collect": ["generation_metrics.jsonl"],
        },
        {"cell": "ldm/four_times/uw/seed0", "commands": [["fit", "longer"]]},
    ]
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps({"groups": groups}))
    rows = study_rows()
    for name, cell in Study.read(file).cells.items():
        append_row(
            tmp_path / "rows" / "results.jsonl", {**rows[name], "cell": name, "hash": cell.hash}
        )
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("before\n\n<!-- curves: begin -->\nold\n<!-- curves: end -->\n\nafter\n")
    folders = [f"--folder={tmp_path / 'rows'}", f"--docs={page.parent}", f"--study={file}"]
    assert main(folders) == 0
    assert main(folders) == 0
    text = page.read_text()
    assert text.startswith("before\n\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("### Scores, latent diffusion\n") == 1
    assert "7 of 7 cells finished" in text
    pictures = list((page.parent / "results").glob("*.png"))
    assert [path.name for path in pictures] == ["curves_ldm.png"]  # none of a single method
    assert pictures[0].stat().st_size > 10_000
    assert len((page.parent / "results" / "curves.jsonl").read_text().splitlines()) == 7
    assert main([f"--folder={tmp_path}", f"--docs={page.parent}", f"--study={file}"]) == 1


def test_the_study_pairs_every_method_with_vanilla(monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = Study.read(Path("studies/curves.yaml")).cells
    finals = [name for name in cells if name.startswith(("ldm/snr/", "adm/snr/", "sit/snr/"))]
    assert len(finals) == 9 * 6 + 5 * 3 + 5 * 3
    for name in finals:
        model, _, _, seed = name.split("/")
        assert f"{model}/snr/vanilla/{seed}" in cells
        tuned = [needed for needed in cells[name].needs if needed.startswith("tune/")]
        assert tuned == [f"tune/{model}/{name.split('/')[2]}"]
        assert not any("seed100" in arg for command in cells[name].commands for arg in command)
