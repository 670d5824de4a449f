"""What a scheduler sees: exit codes, one line, and `--ckpt_path last` after a fault."""

import os
import re
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch
from tiny_fit import assert_same

from ant_lightning import Dashboard
from ant_lightning.cli.main import main

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "digits" / "dit.yaml"


def arguments(folder, *, steps=9, command="fit"):
    return [
        command,
        f"--config={CONFIG}",
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.callbacks=[]",
        f"--trainer.max_steps={steps}",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.accelerator=cpu",
        "--data.init_args.batch_size=300",
        "--model.init_args.backbone.init_args.hidden_size=16",
        "--model.init_args.backbone.init_args.depth=1",
        "--checkpoint.every_n_train_steps=3",
    ]


def test_stopped_damaged_and_gone_on_with(tmp_path, capsys):
    with pytest.warns(UserWarning, match="no checkpoint in .*training starts from the beginning"):
        assert main([*arguments(tmp_path / "whole"), "--ckpt_path=last"]) == 0
    # The signal comes once a checkpoint is there: from a thread, as from a scheduler.
    stop = threading.Event()
    killer = threading.Thread(target=terminate_after_a_checkpoint, args=(tmp_path / "run", stop))
    killer.start()
    try:
        code = main(arguments(tmp_path / "run", steps=10_000))
    finally:
        stop.set()
        killer.join()
    assert code == 143
    folder = next((tmp_path / "run").rglob("checkpoints"))
    assert re.fullmatch(
        rf"ant-lightning: stopped by a signal at step \d+; checkpoint {folder}/last\.ckpt; "
        "to go on, give the same command with --ckpt_path last",
        capsys.readouterr().err.splitlines()[-1],
    )
    # At step 3 and at the last one, which it may be itself.
    assert len(list(folder.iterdir())) in {2, 3}
    for path in folder.glob("*.ckpt"):
        if path.stat().st_mtime_ns == max(p.stat().st_mtime_ns for p in folder.iterdir()):
            path.write_bytes(path.read_bytes()[:5000])
            damaged = path.name
    steps = max(int(path.stem.split("_")[1]) for path in folder.glob("step*")) + 4
    with pytest.warns(UserWarning, match=f"skipped .*{damaged}"):
        assert main([*arguments(tmp_path / "run", steps=steps), "--ckpt_path=last"]) == 0
    # The same folder, so that curves and the files that are kept go on.
    assert [path.name for path in (tmp_path / "run" / "digits_dit").iterdir()] == ["version_0"]
    assert main(arguments(tmp_path / "other", steps=steps)) == 0
    last = [next((tmp_path / name).rglob("last.ckpt")) for name in ("run", "other")]
    assert_same(*last)


def terminate_after_a_checkpoint(folder, stop):
    while not stop.wait(0.01):
        if any(folder.rglob("last.ckpt")):
            os.kill(os.getpid(), signal.SIGTERM)
            return


def test_a_log_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(arguments(tmp_path / "file" / "runs")) == 2
    assert capsys.readouterr().err.startswith(
        "ant-lightning: error: trainer.logger.save_dir: must be a folder that can be written to"
    )


def fill_the_disk(callback, trainer, *args):
    if trainer.global_step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


# TensorBoard writes from a thread, which says so before the run hears of it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore:checkpoint. .* could not be written:UserWarning")
def test_curves_on_a_full_disk_end_the_run_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Dashboard, "on_train_batch_end", fill_the_disk)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        code = main([*arguments(tmp_path, steps=400), "--trainer.log_every_n_steps=1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "ant-lightning: error: trainer.logger.save_dir: could not be written: File too large"
    )
    last = next(tmp_path.rglob("last.ckpt"))
    assert torch.load(last, weights_only=True)["global_step"] == 3


def test_only_training_starts_from_nothing(tmp_path, capsys):
    assert main([*arguments(tmp_path, command="validate"), "--ckpt_path=last"]) == 2
    assert "ckpt_path: 'last' needs a checkpoint, found none in" in capsys.readouterr().err
