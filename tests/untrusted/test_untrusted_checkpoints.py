"""A checkpoint from elsewhere, at every place of the command line that takes one."""

import warnings
from pathlib import Path

import pytest
import torch

from ant_lightning.cli.main import main
from ant_lightning.cli.parser import run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = [
    *("--config", str(CONFIGS / "digits" / "dit.yaml")),
    *("--config", str(CONFIGS / "balancer" / "uw.yaml")),
    "--model.backbone.hidden_size=16",
    "--model.backbone.depth=1",
    "--model.backbone.num_heads=2",
    "--data.batch_size=20",
    "--trainer.max_steps=1",
    "--trainer.callbacks=[]",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_val_batches=0",
]


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step: its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    run(["fit", *TINY, f"--trainer.logger.save_dir={folder}"])
    return next(folder.rglob("last.ckpt"))


def poisoned(good, path, trace):
    content = torch.load(good, weights_only=True)
    torch.save({**content, "callbacks": {"x": Harmful(trace)}}, path)
    return path


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_that_would_run_code_is_refused_by_every_command(
    tmp_path, trained, command, capsys, monkeypatch
):
    # With this, torch alone would unpickle anything.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = poisoned(trained, tmp_path / "c.ckpt", tmp_path / "trace")
    args = [command, *TINY, f"--trainer.logger.save_dir={tmp_path}", f"--ckpt_path={path}"]
    assert main(args) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert "c.ckpt" in line
    assert "refused" in line
    assert not (tmp_path / "trace").exists()


def test_last_does_not_run_code_either(tmp_path, trained, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    args = ["fit", *TINY, f"--trainer.logger.save_dir={tmp_path}"]
    assert main(args) == 0
    last = next(tmp_path.rglob("last.ckpt"))
    for path in last.parent.iterdir():
        poisoned(trained, path, tmp_path / "trace")
    again = [*args, "--ckpt_path=last", f"--checkpoint.dirpath={last.parent}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged files are named there
        code = main([*again, "--trainer.max_steps=2"])
    assert not (tmp_path / "trace").exists()
    assert code in {0, 2}, capsys.readouterr().err


def test_the_protection_cannot_be_switched_off(trained, capsys):
    assert main(["validate", *TINY, f"--ckpt_path={trained}", "--weights_only=false"]) == 2
    assert "weights_only: must be true" in capsys.readouterr().err


def test_initial_weights_do_not_run_code(tmp_path, trained, capsys):
    path = poisoned(trained, tmp_path / "official.pt", tmp_path / "trace")
    args = ["fit", *TINY, f"--trainer.logger.save_dir={tmp_path}", f"--model.init_from={path}"]
    assert main(args) == 2
    assert "official.pt: refused" in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()
