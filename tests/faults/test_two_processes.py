"""The same command in two processes, which order sets differently, trains the same model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_fit import assert_same

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_the_same_model_bit_for_bit(tmp_path):
    files = ["digits/dit", "balancer/nash", "clustering/snr"]
    command = [
        *(sys.executable, "-m", "ant_lightning", "fit"),
        *(f"--config={CONFIGS / name}.yaml" for name in files),
        "--model.init_args.sampling.sampler.init_args.num_steps=2",
        "--trainer.deterministic=true",
        "--trainer.max_steps=30",
        "--trainer.val_check_interval=20",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
    ]
    for seed in ("1", "2"):
        subprocess.run(
            [*command, f"--trainer.logger.init_args.save_dir={tmp_path / seed}"],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
    one, two = (next((tmp_path / seed).rglob("last.ckpt")) for seed in ("1", "2"))
    assert_same(one, two)
