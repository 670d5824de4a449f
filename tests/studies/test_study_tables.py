"""Tables and reports from rows and files: what is in them, what is left out."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from ant_lightning import ConfigError, CosineSchedule, DiscreteDiffusion, TransferGapResult
from ant_lightning.cli.curves import read_curves
from ant_lightning.cli.main import main as ant_lightning
from ant_lightning.cli.report import write_report
from ant_lightning.tasks.time_axis import NoiseCells
from ant_lightning.transfer.gap import GapEstimate
from ant_lightning.transfer.result import IntervalGap
from studies.ntg import gap_results, gap_table, main as ntg_main, mean_table
from studies.results import append_row, read_rows
from studies.study import Study
from studies.tables import TableRows, main, poster_tables, tables_study
from studies.text_table import TextTable

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "studies/tables.yaml"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def gaps(shift):
    """Five per cent of negative transfer at little noise, none at much."""
    made = []
    for budget in ("iterations", "samples"):
        for start, stop, gap in [(0, 40, -0.05 + shift), (40, 100, 0.01)]:
            made.append(
                IntervalGap(
                    start=start,
                    stop=stop,
                    budget=budget,
                    specialist_steps=100 if budget == "iterations" else 50,
                    multitask_loss=0.5,
                    specialist_loss=0.5 + gap / 2,
                    loss_gap=GapEstimate(gap / 2, gap / 2 - 0.01, gap / 2 + 0.01),
                    multitask_fid=4.0,
                    specialist_fid=4.0 + 10 * gap,
                    fid_gap=GapEstimate(10 * gap, 10 * gap - 0.1, 10 * gap + 0.2),
                )
            )
    return TransferGapResult(
        gaps=tuple(made),
        multitask_steps=100,
        num_images=30,
        num_held_out=20,
        sampler_steps=60,
        sampler_steps_unshared=100,
    )


def test_gaps_of_a_study_are_drawn_and_tabulated(tmp_path, capsys):
    for method, shift in {"vanilla": 0.0, "uw": 0.04}.items():
        row = {**gaps(shift).row(), "sampler": "DDIM"}
        files = {"negative_transfer_gap.jsonl": [{"gaps": []}, row]}  # the last line counts
        axes = {"seed": 0, "method": method}
        append_row(tmp_path / "rows.jsonl", {"axes": axes, "files": files})
    append_row(tmp_path / "rows.jsonl", {"axes": {"seed": 0}, "files": {}})
    assert ntg_main([str(tmp_path / "rows.jsonl")]) == 0
    text = (tmp_path / "ntg.md").read_text()
    assert "| vanilla | 0-39 | 100 of 100 | -5.00 [-7.00, -3.00] | -0.500 [-0.600, -0.300]" in text
    assert "40% saved" in text
    rows = list(
        csv.DictReader((tmp_path / "mean_negative-transfer_gap.csv").read_text().splitlines())
    )
    assert [row["method"] for row in rows] == ["vanilla", "uw"]
    assert rows[0]["mean loss gap, by iterations (%)"] == "-2.00"
    assert list(rows[0].values())[3] == "1 / 0 of 2"
    assert (tmp_path / "ntg.png").stat().st_size > 10000
    assert ntg_main([str(tmp_path / "rows.jsonl"), "--seed", "1"]) == 2
    assert "seed 1" in capsys.readouterr().err


def test_gaps_of_settings_that_have_changed_since_are_not_mixed_in(tmp_path, capsys):
    study = Study.read(ROOT / "studies/ntg.yaml")
    for method, digest in [("vanilla", study.cells["gap_vanilla/seed0"].hash), ("uw", "old")]:
        row = {"cell": f"gap_{method}/seed0", "hash": digest}
        row["axes"] = {"seed": 0, "method": method}
        row["files"] = {"negative_transfer_gap.jsonl": [gaps(0.0).row()]}
        append_row(tmp_path / "results.jsonl", row)
    assert ntg_main([str(tmp_path)]) == 0
    text = (tmp_path / "ntg.md").read_text()
    assert "| vanilla |" in text
    assert "| uw |" not in text


def test_the_tables_of_the_results_are_those_of_the_committed_rows():
    rows = read_rows(ROOT / "docs/results/ntg.jsonl")
    text = (ROOT / "docs/results.md").read_text()
    for table in (mean_table(gap_results(rows)), gap_table(gap_results(rows))):
        assert table.markdown() in text
    # The wheel has them for a notebook.
    shipped = json.loads((ROOT / "ant_lightning/measured/digits_gaps.json").read_text())
    assert shipped == {name: each.row() for name, each in gap_results(rows).items()}


def measured(fid, guidance=1.5):
    scores = {"fid": fid, "inception_score": 5.0, "precision": 0.5, "recall": 0.25}
    return {
        "files": {
            "generation_metrics.jsonl": [
                {"scores": {"fid": 99.0}},
                {"scores": scores, "guidance_scale": guidance},  # the last line counts
            ],
            "step_cost.json": {
                "peak_memory_gb": 1.5,
                "iterations_per_second": 20.0,
                "memory_of": "a GPU",
            },
        }
    }


def test_published_values_stand_beside_ours_for_the_same_data_alone():
    rows = {"adm/vanilla/seed0": measured(30.0), "ldm/snr/uw/seed0": measured(9.5)}
    rows["adm/vanilla/seed1"] = measured(99.0)
    first, third = poster_tables(TableRows(rows, 0), dataset="ffhq")
    assert first.columns[3:] == [
        "FID", "precision", "recall", "FID, published", "precision, published", "recall, published"
    ]  # fmt: skip
    assert len(first.rows) == 2 * (1 + 3 * 4)
    assert " ".join(first.rows[0]) == "ADM  vanilla 30.000 0.500 0.250 24.95 0.5427 0.3996"
    assert ["ADM", "timestep", "linear", "", "", "", "", "", ""] in first.rows
    assert ["LDM", "gradient", "pcgrad", "", "", "", "9.189", "0.7359", "0.4904"] in first.rows
    assert third.rows[3] == ["uw", "1.500", "a GPU", "20.000", "34.350", "2.103"]
    assert third.rows[1] == ["pcgrad", "", "", "", "28.160", "1.523"]
    (ours, _) = poster_tables(TableRows(rows, 0), dataset="digits")
    assert ours.columns == ["model", "clustering", "method", "FID", "precision", "recall"]


def test_the_panel_has_table_2s_cells_at_the_guidance_they_were_measured_with():
    rows = {
        "dit/uw/guidance_2.0/seed0": measured(5.0, guidance=2.0),
        "dit/uw/seed0": measured(6.0),
        "dit/minsnr/seed0": measured(8.0),
        "dit/vanilla/guidance_1.0/seed0": measured(7.0, guidance=1.0),
    }
    panel, second = poster_tables(TableRows(rows, 0), dataset="imagenet")
    assert " ".join(second.rows[2]) == "ANT-UW 6.000 5.000 0.500 0.250 6.17 203.45 0.82 0.47"
    assert [row[:3] for row in panel.rows] == [
        ["vanilla", "1", "7.000"],
        ["uw", "1.5", "6.000"],
        ["uw", "2", "5.000"],
    ]


def test_published_values_are_those_of_the_poster():
    published = json.loads((ROOT / "studies/published.json").read_text())
    assert {name: len(published[name]) for name in ("ffhq", "celebahq", "imagenet")} == {
        "ffhq": 20, "celebahq": 20, "imagenet": 3
    }  # fmt: skip
    assert published["celebahq"]["adm/timestep/uw"]["fid"] == "17.74"
    assert published["celebahq"]["ldm/snr/uw"]["fid"] == "9.030"
    assert "poster" in published["source"]


@pytest.mark.parametrize("dataset", ["digits", "shapes", "ffhq", "celebahq", "imagenet"])
def test_every_cell_of_the_tables_is_in_the_study_in_a_useful_order(dataset, tmp_path):
    root = None if dataset in {"digits", "shapes"} else str(tmp_path)
    study = tables_study(STUDY, dataset=dataset, root=root, seed=3)
    names = [name.removesuffix("/seed3") for name in study.cells]
    assert len(names) == len(study.cells)
    models = [] if dataset == "imagenet" else ["adm", "ldm"]
    for model in models:
        order = [n for n in names if n.startswith(f"{model}/")]
        assert order[:2] == [f"{model}/vanilla", f"{model}/affinity"]
        assert len(order) == 2 + 3 * 4
        assert all(
            f"{model}/gradient/{m}" in order[-4:] for m in ("linear", "pcgrad", "nash", "uw")
        )
        assert study.cells[f"{model}/gradient/uw/seed3"].needs[-1] in study.cells
    if dataset in {"digits", "shapes", "imagenet"}:
        assert {"dit/vanilla", "dit/minsnr", "dit/uw"} <= set(names)
    commands = [c for cell in study.cells.values() for c in cell.commands]
    if root:
        assert all(f"--data.init_args.root={root}" in c for c in commands)
    assert all("--ckpt_path=last" in c for c in commands if c[0] == "fit")  # a killed one goes on
    assert not any("{" in arg for cell in study.cells.values() for c in cell.commands for arg in c)


def test_bad_data_sets_are_named(tmp_path, capsys):
    for args, words in [
        (
            ["--dataset", "lsun"],
            "must be one of digits, shapes, ffhq, celebahq, imagenet, found lsun",
        ),
        (["--dataset", "ffhq"], "root: must name the folder of the images for ffhq"),
        (["--dataset", "ffhq", "--root", "no"], "root: must be a folder that exists, found no"),
        (["--root", "here"], "root: must not be given for digits"),
        (["--reference", "no.npz"], "reference: must be a file that exists, found no.npz"),
        (["--study", str(tmp_path / "no.yaml")], "no.yaml"),
    ]:
        assert main([*args, "--folder", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err


def test_tables_of_an_unfinished_study_have_empty_cells(tmp_path):
    study = tables_study(STUDY, dataset="digits")
    row = {"cell": "dit/minsnr/seed0", "hash": study.cells["dit/minsnr/seed0"].hash}
    append_row(tmp_path / "results.jsonl", {**row, **measured(7.0)})
    append_row(tmp_path / "results.jsonl", {**row, "hash": "old", **measured(70.0)})
    assert main(["--folder", str(tmp_path), "--no-run"]) == 0
    text = (tmp_path / "tables.md").read_text()
    assert "| MinSNR | 7.000 | 5.000 | 0.500 | 0.250 |" in text
    assert "| vanilla |  |  |  |  |" in text
    assert "Table 1" not in text
    found = (tmp_path / "table_2_class-conditional_dit.csv").read_text().splitlines()
    assert found[0] == "method,FID,IS,precision,recall"


def test_a_bar_in_a_cell_does_not_break_the_table():
    assert TextTable("t", ["a"], [["x|y"]]).markdown() == "| a |\n| --- |\n| x\\|y |\n"


def test_report_of_a_run_has_what_the_run_has(tmp_path):
    boundaries = [0, 30, 70, 100]
    config = yaml.safe_load((ROOT / "configs/digits/dit.yaml").read_text())
    process = config["model"]["init_args"]["process"]["init_args"]
    process["schedule"]["init_args"] = {"num_timesteps": 100}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    few = write_report(tmp_path).read_text()
    assert "| balancer | none (vanilla) |" in few
    assert "| draws of timesteps | uniform |" in few
    assert "| sampler | DDIM(num_steps 50) |" in few
    assert "| parameters |" not in few
    assert not any(f"## {name}" in few for name in ("Clusters", "Task", "Sweeps"))
    assert "## Scores\n\nNone: no validation with scores has ended" in few
    assert "## Curves\n\nNone: only TensorBoard's event files are read" in few

    (tmp_path / "checkpoints").mkdir()
    state = {
        "state_dict": {"backbone.weight": torch.zeros(3, 4)},
        "global_step": 42,
        "ant_lightning": {"boundaries": boundaries},
    }
    torch.save(state, tmp_path / "checkpoints" / "last.ckpt")
    writer = SummaryWriter(str(tmp_path))
    for step in (1, 2):
        writer.add_scalar("train/loss", 1 / step, step)
    writer.add_scalar("val/fid", 5.0, 2)
    for task, weight in enumerate((0.3, 0.3, 0.367)):  # means, which do not sum to 1
        writer.add_scalar(f"train/task_{task}/weight", weight, 1)
    writer.add_scalar("val/task_1/loss", 0.25, 2)
    writer.close()
    swept = {"guidance_scale": 1.5, "ema_length": None, "step": 42, "extractor": "Tiny"}
    (tmp_path / "sweep.jsonl").write_text(json.dumps({**swept, "scores": {"fid": 3.5}}) + "\n")
    advised = {"step": 42, "advice": [{"title": "Measure with more images"}]}
    (tmp_path / "diagnosis.json").write_text(json.dumps(advised))
    line = {"scores": {"fid": 4.25}, "step": 42, "sampler": "DDIM(num_steps=50)"}
    (tmp_path / "generation_metrics.jsonl").write_text(json.dumps(line) + "\n")
    gaps(0.0).save(tmp_path / "negative_transfer_gap.jsonl")
    measured = ROOT / "ant_lightning/measured/digits_affinity.safetensors"
    shutil.copy(measured, tmp_path / "task_affinity.safetensors")
    (tmp_path / "1_samples_grid.png").touch()

    assert ant_lightning(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert read_curves(tmp_path)["train/loss"] == [(1, 1.0), (2, 0.5)]
    log_snr = DiscreteDiffusion(CosineSchedule(100)).log_snr
    for words in (
        "| parameters | 12 |",
        "| optimizer steps | 42 |",
        "| fid | 4.25 |",
        "step 42, sampler DDIM(num_steps=50)",
        "| train/loss | 2 | 2 | 0.5 |",
        "| log-SNR | held-out loss (step 2) | share of the weights, % (step 1) |",
        f"| 1 | 30-69 | {float(log_snr[69]):.2f} to {float(log_snr[30]):.2f} | 0.25 | 31 |",
        " |  | 38 |",
        "| 42 | 1.5 |  | 3.5 | Tiny |",
        "1. Measure with more images",
        "(diagnosis.html)",
        "<details><summary>all settings</summary>",
        "Lowest split-half reliability",
        "-5.00 [-7.00, -3.00]",
        "class_path: ant_lightning.DiTModule",
    ):
        assert words in text
    for name in ("curves", "clusters", "affinity", "negative_transfer"):
        assert f"(report_{name}.png)" in text
        assert (tmp_path / f"report_{name}.png").stat().st_size > 5000
    assert "(1_samples_grid.png)" in text
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == text.count(".png)")
    assert "<td>4.25</td>" in page
    assert '<a href="diagnosis.html">' in page
    assert '<code class="language-yaml">' in page
    # A checkpoint of today holds the noise axis: the same report, without PyTorch.
    (tmp_path / "task_affinity.safetensors").unlink()
    (tmp_path / "negative_transfer_gap.jsonl").unlink()
    assert ant_lightning(["report", str(tmp_path)]) == 0
    text, picture = (tmp_path / "report.md").read_text(), tmp_path / "report_clusters.png"
    drawn = picture.read_bytes()
    cells = NoiseCells.of(DiscreteDiffusion(CosineSchedule(100)))
    state["ant_lightning"]["noise_cells"] = cells.state()
    torch.save(state, tmp_path / "checkpoints" / "last.ckpt")
    code = (
        "import sys; from ant_lightning.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(code or ', '.join({'torch', 'lightning', 'boto3'} & {*sys.modules}) or 0)"
    )
    subprocess.run([sys.executable, "-c", code, "report", str(tmp_path)], check=True)
    assert (tmp_path / "report.md").read_text() == text
    assert picture.read_bytes() == drawn
    with pytest.raises(ConfigError, match=r"must be the folder of a run, found no config\.yaml"):
        write_report(tmp_path / "checkpoints")
    assert ant_lightning(["report", str(tmp_path / "checkpoints")]) == 2
