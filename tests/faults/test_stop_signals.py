"""A run that is told to stop leaves a checkpoint that goes on as if nothing had happened."""

import os
import signal

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tiny_digits import module, trainer
from tiny_fit import assert_same, fit
from torch.utils.data import DataLoader

from ant_lightning import Checkpoints, DigitsData


class Kill(L.Callback):
    """Sends this process a signal in the middle of a step or of an evaluation."""

    def __init__(self, number, step, hook):
        self.number, self.step = number, step
        setattr(self, hook, self._kill)

    def _kill(self, trainer, *args):
        if trainer.global_step == self.step and not trainer.sanity_checking:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "hook", "step"),
    [
        (signal.SIGTERM, "on_train_batch_start", 4),
        (signal.SIGUSR1, "on_before_optimizer_step", 6),
        (signal.SIGTERM, "on_validation_batch_start", 6),
        (signal.SIGINT, "on_before_optimizer_step", 4),
    ],
)
def test_the_step_is_finished_and_kept(tmp_path, number, hook, step):
    before = signal.getsignal(number)
    kill = Kill(number, step, hook)
    with pytest.raises(SIGTERMException) as stopped:
        fit(tmp_path / "stopped", callbacks=[kill], every=100, val_interval=3)
    assert stopped.value.args == (number,)
    assert signal.getsignal(number) == before
    reached = step if hook == "on_validation_batch_start" else step + 1
    resume = tmp_path / "stopped" / f"step={reached}.ckpt"
    fit(tmp_path / "resumed", every=100, val_interval=3, resume=resume)
    fit(tmp_path / "whole", every=100, val_interval=3)
    assert_same(tmp_path / "whole" / "last.ckpt", tmp_path / "resumed" / "last.ckpt")


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_a_command_that_does_not_train_is_broken_off(tmp_path, command):
    before = signal.getsignal(signal.SIGTERM)
    fit(tmp_path, every=100)
    names = sorted(path.name for path in tmp_path.iterdir())
    hook = {"validate": "on_validation_end", "predict": "on_predict_batch_start"}[command]
    kill = Kill(signal.SIGTERM, 0, hook)
    checkpoints = Checkpoints(dirpath=str(tmp_path))
    run = trainer(tmp_path, kill, checkpoints, enable_checkpointing=True, limit_val_batches=1)
    data = {"validate": DigitsData(batch_size=30), "predict": DataLoader(range(4), batch_size=2)}
    with pytest.raises(SIGTERMException) as stopped:
        getattr(run, command)(module(), data[command])
    assert stopped.value.args == (signal.SIGTERM,)
    assert signal.getsignal(signal.SIGTERM) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names


class Impatient(L.Callback):
    """Ctrl-C twice in one step."""

    def on_before_optimizer_step(self, trainer, *args):
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once_and_keeps_what_was_saved(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):  # as Lightning ends a process after Ctrl-C
            fit(tmp_path, callbacks=[Impatient()], every=2)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


class Handler(L.Callback):
    """What a signal would do before the first step: Lightning has its own handlers then."""

    def on_train_start(self, trainer, pl_module):
        self.found = signal.getsignal(signal.SIGUSR1)


def test_on_slurm_lightning_does_not_save_and_requeue_by_itself(tmp_path, monkeypatch):
    for name in ("JOB_ID", "NTASKS", "NTASKS_PER_NODE", "NNODES"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    handler = Handler()
    fit(tmp_path, steps=1, callbacks=[handler], plugins=[SLURMEnvironment()])
    assert handler.found == signal.SIG_DFL
