"""The study of the tables at twelve steps a cell: every kind of cell, killed in between."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from studies.results import read_rows

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--trainer.max_steps=12", "--data.init_args.batch_size=20"]


def tiny_study(folder, dataset):
    """The shipped file with few steps, images and timesteps."""
    content = yaml.safe_load((ROOT / "studies/tables.yaml").read_text())
    content["groups"]["autoencoder"]["commands"][0] += QUICK
    parts = content["datasets"][dataset]["parts"]
    parts["data"] += [*QUICK, "--model.init_args.sampling.sampler.init_args.num_steps=2"]
    if dataset == "shapes":
        parts["data"] += ["--data.init_args.num_images=60", "--data.init_args.num_held_out=20"]
    parts["extractor"].append("--trainer.callbacks.init_args.num_images=20")
    parts["rows"] = [f"--trainer.callbacks.init_args.num_{n}=8" for n in ("points", "images")]
    path = folder / "tables.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dataset", ["digits", "shapes"])
def test_every_kind_of_cell_runs_and_a_killed_study_goes_on(tmp_path, dataset):
    command = [sys.executable, "-m", "studies.tables", "--dataset", dataset]
    command += ["--study", str(tiny_study(tmp_path, dataset)), "--folder", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    rows = tmp_path / "out" / "results.jsonl"

    def finished():
        return [row["cell"] for row in read_rows(rows)]

    def run(only):
        done = subprocess.run(
            [*command, "--only", only],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    # Killed with its first cell finished and the second at work: the first is not run again.
    with subprocess.Popen(
        [*command, "--only", "ldm/gradient/nash/*"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as first:
        while not finished() and first.poll() is None:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    assert finished() == ["autoencoder/seed0"]
    run("ldm/gradient/nash/*")
    names = ["autoencoder", "ldm/vanilla", "ldm/affinity", "ldm/gradient/nash"]
    assert finished() == [f"{name}/seed0" for name in names]
    run("dit/uw/guidance_2.0/*")
    run("dit/minsnr/*")
    run("adm/timestep/pcgrad/*")
    assert not (tmp_path / "out" / "failures.jsonl").exists()

    text = (tmp_path / "out" / "tables.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines()]
    full = [line for line in lines if line[-1] not in {"|", " |"} and not line[-1].startswith(" ")]
    for start in (
        ["| LDM", "", "vanilla"],
        ["| LDM", "gradient", "nash"],
        ["| ADM", "timestep", "pcgrad"],
        ["| MinSNR"],
        ["| ANT-UW"],
        ["| uw", "1.5"],
        ["| uw", "2"],
    ):
        (line,) = [each for each in full if each[: len(start)] == start]
        assert all(float(cell.strip(" |")) >= 0 for cell in line[len(start) :])
