"""The runner of studies: nothing finished is lost, run twice or mixed."""

import json
import multiprocessing
from pathlib import Path

import pytest
import yaml

from ant_lightning import ConfigError
from studies.__main__ import main
from studies.results import append_row, finished_rows, only_user, read_rows
from studies.runner import run_study
from studies.study import Study

COMMAND = "study_command"
CONTENT = {
    "parts": {"size": {"small": ["1"], "large": ["10"]}, "value": [COMMAND, "<>", "value"]},
    "groups": [
        {
            "cell": "sum/{seed}",  # first in the file, last to run
            "axes": {"seed": [0, 1]},
            "commands": [[COMMAND, "<>", "add", "<{seed}/small>", "<{seed}/large>"]],
            "collect": ["value.json"],
        },
        {
            "cell": "{seed}/{size}",
            "axes": {"seed": [0, 1], "size": ["small", "large"]},
            "commands": [[COMMAND, "<>", "nothing"], ["@value", "@size"]],
            "collect": ["value.json"],
        },
    ],
}


def changed(**groups):
    """CONTENT with other settings of the second group."""
    return {**CONTENT, "groups": [CONTENT["groups"][0], {**CONTENT["groups"][1], **groups}]}


def run(content, folder, **settings):
    lines = []
    failed = run_study(Study.of(content), folder, report=lines.append, **settings)
    return failed, lines


def values(content, folder):
    rows = finished_rows(Study.of(content), folder / "results.jsonl")
    return {name: row["files"]["value.json"] for name, row in rows.items()}


def calls(folder, name):
    return [p.read_text().split() for p in sorted(folder.glob(f"cells/{name}-*/calls"))]


def test_cells_run_after_what_they_need_and_only_once(tmp_path):
    failed, _ = run(CONTENT, tmp_path, jobs=2)
    assert failed == []
    assert values(CONTENT, tmp_path) == {
        **{f"{s}/small": 1 for s in (0, 1)},
        **{f"{s}/large": 10 for s in (0, 1)},
        **{f"sum/{s}": 11 for s in (0, 1)},
    }
    rows = {row["cell"]: row for row in read_rows(tmp_path / "results.jsonl")}
    row = rows["0/small"]
    assert row["axes"] == {"seed": 0, "size": "small"}
    assert row["commit"]
    assert "1 threads" in row["machine"]
    assert len(row["seconds"]) == 2
    assert run(CONTENT, tmp_path)[1][0].startswith("0 of 6 cells")
    assert calls(tmp_path, "0/small") == [["nothing", "value"]]


def test_a_part_may_be_for_some_levels_alone():
    content = changed(commands=[["@first:size"], ["@value", "@size"]])
    content["parts"] = {**CONTENT["parts"], "first": {"large": [COMMAND, "<>", "nothing"]}}
    cells = Study.of(content).cells
    assert [len(cells[f"0/{size}"].commands) for size in ("small", "large")] == [1, 2]


def test_a_pattern_runs_what_its_cells_need(tmp_path):
    run(CONTENT, tmp_path, only="sum/1")
    assert set(values(CONTENT, tmp_path)) == {"sum/1", "1/small", "1/large"}
    with pytest.raises(ConfigError, match=r"only: must match a cell.*found 'sum/2'"):
        run(CONTENT, tmp_path, only="sum/1 sum/2")
    run(CONTENT, tmp_path, only="sum/1 0/*")
    assert set(values(CONTENT, tmp_path)) == {"sum/1", "1/small", "1/large", "0/small", "0/large"}


def test_a_failed_cell_is_reported_and_run_again(tmp_path):
    gate = tmp_path / "gate"
    content = changed(commands=[["@value", "@size"], [COMMAND, "<>", "fail_unless", str(gate)]])
    content["groups"][1]["axes"] = {"seed": [0, 1], "size": ["small"]}
    content["groups"].append(
        {"cell": "{s}/large", "axes": {"s": [0, 1]}, "commands": [["@value", "5"]]}
    )
    folder = tmp_path / "study"
    failed, lines = run(content, folder)
    assert sorted(failed) == ["0/small", "1/small", "sum/0", "sum/1"]
    assert any("0/small: FAILED, exit code 3: no " in line for line in lines)
    assert any("sum/1: not run" in line for line in lines)
    assert {row["cell"] for row in read_rows(folder / "failures.jsonl")} == {"0/small", "1/small"}
    assert set(finished_rows(Study.of(content), folder / "results.jsonl")) == {"0/large", "1/large"}
    gate.touch()
    assert run(content, folder)[0] == []
    assert values_of_sums(content, folder) == {"sum/0": 6, "sum/1": 6}
    # what was done before the failure was not done again
    assert calls(folder, "0/small") == [["value", "fail_unless", "fail_unless"]]


def values_of_sums(content, folder):
    rows = finished_rows(Study.of(content), folder / "results.jsonl")
    return {n: r["files"]["value.json"] for n, r in rows.items() if n.startswith("sum")}


def test_a_missing_collected_file_is_a_failure(tmp_path):
    failed, lines = run(changed(collect=["other.json"]), tmp_path, only="0/small")
    assert failed == ["0/small"]
    assert any("collects other.json, which was not written" in line for line in lines)
    run(changed(collect=["other.json"]), tmp_path, only="0/small")
    assert calls(tmp_path, "0/small") == [["nothing", "value"] * 2]


def test_changed_settings_are_refused_by_name_and_never_mixed(tmp_path):
    run(CONTENT, tmp_path)
    first = values(CONTENT, tmp_path)
    content = changed()
    content["parts"] = {**CONTENT["parts"], "size": {"small": ["2"], "large": ["10"]}}
    # sums changed too: they are made of what changed
    names = "sum/0, sum/1, 0/small, 1/small"
    with pytest.raises(ConfigError, match=f"settings of 4 finished cells .* ran: {names};"):
        run(content, tmp_path)
    assert values(content, tmp_path) == {"0/large": 10, "1/large": 10}
    run(content, tmp_path, rerun_changed=True)
    assert values(content, tmp_path)["sum/0"] == 12
    assert values(CONTENT, tmp_path) == first  # the old rows are kept, under their own hash
    assert len(read_rows(tmp_path / "results.jsonl")) == 10


def test_a_changed_config_file_is_a_changed_cell(tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text("a: 1")
    content = changed(commands=[["@value", "@size"], [COMMAND, "<>", "x", f"--config={config}"]])
    before = Study.of(content).cells["sum/0"].hash
    config.write_text("a: 2")
    assert Study.of(content).cells["sum/0"].hash != before
    config.unlink()
    with pytest.raises(ConfigError, match=r"cell 0/large needs the file .*x\.yaml: not found"):
        Study.of(content)


def _study(content, folder):
    run_study(Study.of(content), Path(folder), report=lambda line: None)


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    mark, folder = tmp_path / "mark", tmp_path / "study"
    kill = [COMMAND, "<>", "kill_runner_unless", str(mark)]
    content = {
        "groups": [
            {
                "cell": "{i}",
                "axes": {"i": [0, 1, 2]},
                "commands": [[COMMAND, "<>", "value", "{i}"], kill],
                "collect": ["value.json"],
            }
        ]
    }
    mark.touch()
    run(content, folder, only="0")
    mark.unlink()
    runner = multiprocessing.get_context("forkserver").Process(
        target=_study, args=(content, folder)
    )
    runner.start()
    runner.join(60)
    assert runner.exitcode == -9
    assert set(values(content, folder)) == {"0"}
    assert run(content, folder)[0] == []
    assert values(content, folder) == {"0": 0, "1": 1, "2": 2}
    assert calls(folder, "0") == [["value", "kill_runner_unless"]]
    assert calls(folder, "1") == [["value", "kill_runner_unless", "kill_runner_unless"]]


def test_a_half_written_row_is_no_row_and_spoils_no_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b')
    assert read_rows(path) == [{"a": 1}]
    append_row(path, {"a": 3})
    assert read_rows(path) == [{"a": 1}, {"a": 3}]


def test_a_copy_of_the_rows_is_gone_on_with(tmp_path):
    kept = [*CONTENT["groups"][1]["collect"], "calls"]
    content = changed(collect=kept)
    run(content, tmp_path / "here", only="?/small")
    there = tmp_path / "there"
    there.mkdir()
    (there / "results.jsonl").write_text((tmp_path / "here/results.jsonl").read_text())
    failed, _ = run(content, there)
    assert failed == []
    assert values(content, there)["sum/0"] == 11
    assert calls(there, "0/small") == [["nothing", "value"]]  # written back, not run


def test_what_a_copy_of_the_rows_lacks_is_made_again(tmp_path):
    """A checkpoint is such a file: no row keeps it, and other cells need it."""
    needs_calls = {
        "cell": "{seed}/after",
        "axes": {"seed": [0]},
        "commands": [[COMMAND, "<>", "fail_unless", "<{seed}/small>/calls"]],
    }
    content = {**CONTENT, "groups": [*CONTENT["groups"], needs_calls]}
    run(content, tmp_path / "here", only="?/[sl]*")
    there = tmp_path / "there"
    there.mkdir()
    (there / "results.jsonl").write_text((tmp_path / "here/results.jsonl").read_text())
    run(content, there, only="sum/1")  # writes back what the rows keep, of every cell
    failed, lines = run(content, there, only="0/after")
    assert failed == []
    assert lines[0].startswith("2 of 7 cells")
    assert calls(there, "0/small") == [["nothing", "value"]]
    assert calls(there, "0/large") == []
    assert run(content, there, only="0/after")[1][0].startswith("0 of 7 cells")


def test_published_rows_are_begun_with_and_replace_nothing(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text(json.dumps(CONTENT))
    run(CONTENT, tmp_path / "here", only="?/small")
    arguments = [str(tmp_path / "study.yaml"), f"--folder={tmp_path / 'there'}", "--list"]
    published = f"--rows={tmp_path / 'here/results.jsonl'}"
    for _ in range(2):
        assert main([*arguments, published]) == 0
        assert "4 to run; 2 finished" in capsys.readouterr().out
    run(CONTENT, tmp_path / "here")
    assert main([*arguments, published]) == 0
    assert "4 to run; 2 finished" in capsys.readouterr().out


def test_one_process_at_a_time(tmp_path):
    with only_user(tmp_path), pytest.raises(ConfigError, match="one process at a time"):
        run(CONTENT, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "mapping with a list `groups`"),
        ({"groups": [], "cells": 1}, r"found \['cells'\]"),
        ({"groups": [{"cell": "a"}]}, r"a group has .* found \['cell'\]"),
        ({"groups": [{"cell": "a", "commands": []}] * 2}, "must differ, found a twice"),
        ({"groups": [{"cell": "a", "commands": [["x", "@y"]]}]}, "@y must be one of parts"),
        ({"groups": [{"cell": "a", "commands": [["x", "<b>"]]}]}, "cell a needs <b>, which is no"),
        ({"groups": [{"cell": "a", "commands": [["x", "<a>"]]}]}, "in a circle: a -> a"),
        (
            {"groups": [{"cell": "a", "commands": [["fit", "--config", "none.yaml"]]}]},
            "needs the file none.yaml",
        ),
    ],
)
def test_a_bad_study_is_named(content, message):
    with pytest.raises(ConfigError, match=message):
        Study.of(content)


def test_the_command_line_of_the_runner(tmp_path, capsys):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(CONTENT))
    args = [str(file), "--folder", str(tmp_path / "out")]
    assert main([*args, "--only", "0/*"]) == 0
    assert main([*args, "--list"]) == 0
    assert "sum/0\nsum/1\n1/small\n1/large\n4 to run; 2 finished" in capsys.readouterr().out
    file.write_text(json.dumps({"groups": 1}))
    assert main(args) == 2
    assert "study: error: study: must be a mapping" in capsys.readouterr().err
    assert main([str(tmp_path / "none.yaml")]) == 2
