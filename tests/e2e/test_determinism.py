"""Two runs with `trainer.deterministic: true` are the same bit for bit, whatever ran before."""

import json
from pathlib import Path

import pytest
import torch
from tiny_fit import everything

from ant_lightning.cli.parser import run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = {
    "dit": ["hidden_size=16", "depth=1", "num_heads=2"],
    "adm": ["model_channels=32", "channel_mult=[1,2]", "num_res_blocks=1"],
}


@pytest.fixture(autouse=True)
def _as_before():
    yield
    torch.use_deterministic_algorithms(False)


def found_by_a_run(folder, model, balancer, *, seed):
    """What a run leaves: its last checkpoint, its scores and its pictures."""
    torch.rand(seed + 1)  # the state of the global generator is not part of the settings
    files = [f"digits/{model}", f"balancer/{balancer}", "clustering/snr"]
    cli = run(
        [
            "fit",
            *(f"--config={CONFIGS / name}.yaml" for name in files),
            *(f"--model.init_args.backbone.init_args.{size}" for size in TINY[model]),
            f"--seed_everything={seed}",
            "--model.init_args.sampling.sampler.init_args.num_steps=2",
            "--data.init_args.batch_size=20",
            "--trainer.deterministic=true",
            "--trainer.max_steps=2",
            "--trainer.val_check_interval=2",
            "--trainer.log_every_n_steps=1",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--trainer.accelerator=cpu",
            f"--trainer.logger.init_args.save_dir={folder}",
        ]
    )
    assert torch.are_deterministic_algorithms_enabled()
    log_dir = Path(cli.trainer.log_dir)
    (row,) = (log_dir / "generation_metrics.jsonl").read_text().splitlines()
    pictures = {path.name: path.read_bytes() for path in log_dir.glob("*grid*.png")}
    assert pictures
    (last,) = log_dir.rglob("last.ckpt")
    return everything(last), json.loads(row)["scores"], pictures


def differences(one, two):
    """Names of the values that are not equal."""
    assert one.keys() == two.keys()
    return [
        name
        for name, value in one.items()
        if not (
            torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
        )
    ]


@pytest.mark.parametrize(
    ("model", "balancer"), [("dit", "pcgrad"), pytest.param("adm", "uw", marks=pytest.mark.slow)]
)
def test_two_runs_leave_the_same_and_another_seed_something_else(tmp_path, model, balancer):
    one = found_by_a_run(tmp_path / "one", model, balancer, seed=0)
    two = found_by_a_run(tmp_path / "two", model, balancer, seed=0)
    for name, first, second in zip(("checkpoint", "scores", "pictures"), one, two, strict=True):
        assert differences(first, second) == [], name
    if model == "dit":
        other = found_by_a_run(tmp_path / "other", model, balancer, seed=1)
        assert all(differences(*pair) for pair in zip(one, other, strict=True))
