"""The recipes of docs/runs.md for SLURM and torchrun, run as they stand there."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from test_command_line import arguments

from ant_lightning.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def recipe(program, args, **sizes):
    """The shell block of docs/runs.md that starts `program`, with these arguments and sizes."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "runs.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if re.search(f"^{program} ", block, re.MULTILINE)]
    for option, (documented, value) in sizes.items():
        words = f"--{option.replace('_', '-')} {documented}"
        assert words in block or words.replace("-nodes", "_nodes") in block
        block = block.replace(words, f"--{option.replace('_', '-')} {value}")
    assert " fit --config ... " in block
    return block.replace("--config ...", shlex.join(args[1:]))


def environment(**more):
    """This tree's package, console scripts and callbacks, one thread, no network."""
    path = [Path(sys.executable).parent, os.environ["PATH"]]
    modules = [ROOT, ROOT / "tests", ROOT / "tests" / "faults"]
    return {
        **os.environ,
        "PATH": os.pathsep.join(map(str, path)),
        "PYTHONPATH": os.pathsep.join(map(str, modules)),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **more,
    }


class KillOnce(L.Callback):
    """Rank 1 dies at step 7, the first time that it gets there."""

    def __init__(self, mark: str):
        self.mark = Path(mark)

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 7 and trainer.global_rank == 1 and not self.mark.exists():
            self.mark.write_text("killed")
            os.kill(os.getpid(), signal.SIGKILL)


def callbacks(kind, **settings):
    entry = {"class_path": f"test_recipes.{kind}", "init_args": settings}
    return f"--trainer.callbacks={json.dumps([entry])}"


def weights(folder):
    return torch.load(next(folder.rglob("last.ckpt")), weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_torchrun_restarts_after_a_rank_is_killed_and_goes_on(tmp_path):
    mark, folder = tmp_path / "mark", tmp_path / "run"
    # AdamW makes lr / eps = 2 times as much of a gradient's rounding, and no whole step of it.
    eps = "--model.optimization.optimizer.init_args.eps=1e-3"
    args = [*arguments(folder, steps=11), eps, callbacks("KillOnce", mark=str(mark))]
    command = recipe("torchrun", args, nproc_per_node=(8, 2)).replace("devices 8", "devices 2")
    run = subprocess.run(
        ["bash", "-c", command],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "a restart may hang" not in run.stderr
    assert mark.read_text() == "killed"
    starts = re.findall(r"^fit: .* from step (\d+)", run.stdout, re.MULTILINE)
    assert starts == ["0", "6"]  # checkpoints are written every 3 steps
    assert [path.name for path in (folder / "digits_dit").iterdir()] == ["version_0"]
    assert main([*arguments(tmp_path / "whole", steps=11), eps]) == 0
    ours, theirs = weights(folder), weights(tmp_path / "whole")
    for name, value in theirs.items():
        if value.is_floating_point():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


SRUN = """#!/bin/sh
"$@" & task=$!
if [ ! -e mark ]; then
    until [ -n "$(find run -name 'step_*.ckpt' 2> /dev/null)" ]; do sleep 0.1; done
    touch mark
    kill -TERM $task
fi
wait $task
"""
SCONTROL = '#!/bin/sh\necho "$@" >> requeued\n'


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_slurm_requeues_a_run_that_is_told_to_stop(tmp_path):
    for name, script in [("srun", SRUN), ("scontrol", SCONTROL)]:
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    args = arguments("run", steps=600)
    args[args.index("--checkpoint.every_n_train_steps=3")] = "--checkpoint.every_n_train_steps=200"
    command = recipe("srun", args).replace("devices 8", "devices 1").replace("nodes 4", "nodes 1")
    (tmp_path / "job.sh").write_text(command)
    slurm = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "digits",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        **{f"SLURM_{each}": "0" for each in ("PROCID", "LOCALID", "NODEID")},
    }
    env = environment(**slurm)
    env["PATH"] = f"{tmp_path}{os.pathsep}{env['PATH']}"
    codes, steps = [], []
    for _ in range(2):
        run = subprocess.run(
            ["bash", "job.sh"],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        codes.append(run.returncode)
        last = next((tmp_path / "run").rglob("last.ckpt"))
        steps.append(torch.load(last, weights_only=True)["global_step"])
    assert codes == [143, 0], run.stderr[-3000:]
    assert 200 <= steps[0] < steps[1] == 600
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert not list(tmp_path.rglob("hpc_ckpt*"))
