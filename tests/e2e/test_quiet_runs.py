"""What a new user reads: every line of a run is one of ours and says something."""

import enum
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, Timer
from lightning.pytorch.callbacks.timer import Interval
from wrong_settings import CONFIGS, arguments

from ant_lightning.cli.config_files import dump_yaml
from ant_lightning.cli.parser import run

ROOT = Path(__file__).resolve().parents[2]
RUN = "runs/digits_dit/version_0"
CKPT = f"{RUN}/checkpoints/last.ckpt"
NUMBER = r"\d[\d.e+-]*"


class Whole(enum.IntEnum):
    three = 3


# All in one process: each start would cost seconds. The last ends it, as a wrong setting does.
CODE = """
import runpy
import sys
from ant_lightning.cli.main import main
base = sys.argv[1].split()
fit = [*base, "--trainer.max_steps=10", "--trainer.val_check_interval=10"]
assert main(["fit", *fit]) == 0
assert main(["validate", *base, "--ckpt_path", sys.argv[2], "--trainer.callbacks=[]"]) == 0
for _ in range(2):
    samples = ["--samples.num_images=3", "--samples.folder=images"]
    assert main(["predict", *base, "--ckpt_path", sys.argv[2], *samples]) == 0
sys.argv = ["ant-lightning", "fit", *base, "--model.optimization.optimizer.lr=-1"]
runpy.run_module("ant_lightning", run_name="__main__")
"""
EXPECTED = [
    rf"fit: DiT with 10\.\d K parameters on cpu, from step 0 to 10, in {RUN}",
    rf"step 10/10, train/loss {NUMBER}, val/loss {NUMBER}, images/s \d+, "
    rf"weights of the 5 tasks [\d/]+ %, val/fid {NUMBER}",
    rf"fit: ended at step 10, checkpoint {CKPT}",
    rf"validate: averaged \(EMA\) weights of {CKPT} at step 10",
    rf"val/loss +{NUMBER}",
    *(rf"val/task_{i}/loss +{NUMBER}" for i in range(5)),
    rf"predict: averaged \(EMA\) weights of {CKPT} at step 10",
    r"predict: 0 of 3 images",  # the second finds them drawn
    r"predict: 3 of 3 images",
    r"3 images are in images",
    rf"predict: averaged \(EMA\) weights of {CKPT} at step 10",
    r"3 images are in images; none was missing, so none was drawn",
]


def test_a_progress_bar_that_the_user_lists_is_kept(tmp_path):
    bar = {"class_path": "RichProgressBar", "init_args": {"refresh_rate": 3}}
    args = arguments(tmp_path, f"--trainer.callbacks={json.dumps([bar])}")
    cli = run([arg for arg in args if arg != "--trainer.enable_progress_bar=false"])
    (found,) = (each for each in cli.trainer.callbacks if isinstance(each, ProgressBar))
    assert type(found) is RichProgressBar
    assert found.refresh_rate == 3


def test_a_timer_among_the_callbacks_is_written_down(tmp_path):
    timer = {"class_path": "Timer", "init_args": {"duration": "00:01:00:00"}}
    cli = run(arguments(tmp_path, f"--trainer.callbacks={json.dumps([timer])}"))
    (config,) = tmp_path.rglob("config.yaml")
    (saved,) = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    assert saved["class_path"] == "lightning.pytorch.callbacks.Timer"
    assert saved["init_args"]["interval"] == "step"
    assert sum(isinstance(each, Timer) for each in cli.trainer.callbacks) == 1


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Interval.step, "step"),
        (Whole.three, 3),
        (np.float64(0.5), 0.5),
        (Path("a/b"), "a/b"),
        ({"a": [Interval.epoch, (1, 2)]}, {"a": ["epoch", [1, 2]]}),
        ("1e-3", "1e-3"),
        (1e-3, 1e-3),
        (True, True),
        (None, None),
    ],
)
def test_settings_are_written_as_plain_values(value, plain):
    found = yaml.safe_load(dump_yaml({"x": value}))["x"]
    assert found == plain
    assert type(found) is type(plain)


def test_commands_print_expected_lines_and_no_others(tmp_path):
    files = [CONFIGS / "digits" / "dit.yaml", CONFIGS / "balancer" / "uw.yaml"]
    base = [x for file in files for x in ("--config", str(file))]
    base += [
        "--trainer.accelerator=cpu",
        "--model.sampling.sampler.num_steps=2",
        "--data.batch_size=20",
    ]
    base += [f"--model.backbone.{x}" for x in ("hidden_size=16", "depth=1", "num_heads=2")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONWARNINGS", None)
    done = subprocess.run(
        [sys.executable, "-c", CODE, " ".join(base), CKPT],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 2, done.stderr
    (error,) = done.stderr.splitlines()
    assert error.startswith("ant-lightning: error: model.optimization.optimizer")
    lines = done.stdout.splitlines()
    assert len(lines) == len(EXPECTED), done.stdout
    for line, expected in zip(lines, EXPECTED, strict=True):
        assert re.fullmatch(expected, line), line
    assert sorted(path.name for path in (tmp_path / RUN / "checkpoints").iterdir()) == [
        "last.ckpt",
        "step_10.ckpt",
    ]
