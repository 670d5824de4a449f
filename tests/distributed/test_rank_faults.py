"""One rank fails in the middle of a run: all end soon, and all say what was wrong first."""

import os
import re
import signal
import time

import lightning as L
import pytest
import torch
from rank_processes import run_ranks
from test_callbacks_on_ranks import Projection
from tiny_runs import TinyData, module, trainer

from ant_lightning import DDIM, Checkpoints, DiTModule, GenerationMetrics, TaskAffinity
from ant_lightning.data.dataset import TensorImages
from ant_lightning.runtime.rank_watch import RankWatch, first_failure, warn_of_shared_store

ERROR = "ValueError: the disk of rank 1 is full"


def fail(rank):
    if rank == torch.distributed.get_rank():
        raise ValueError(f"the disk of rank {rank} is full")


class Fails(L.Callback):
    """Fails on one rank in the hook of this name, the second time."""

    def __init__(self, hook, rank=1, fault=fail):
        self.calls = 0

        def count(*args, **kwargs):
            self.calls += 1
            if self.calls == 2:
                fault(rank)

        setattr(self, hook, count)


class BrokenImages(TensorImages):
    def load(self, indices, *, epoch):
        if 17 in indices:
            fail(1)
        return super().load(indices, epoch=epoch)


class BrokenData(TinyData):
    """One image cannot be read by rank 1, which has it in the third batch of some epoch."""

    def __init__(self, num_workers=0):
        super().__init__()
        self.num_workers = num_workers

    def prepare(self):
        train, held_out = super().prepare()
        return BrokenImages(train.images, train.labels), held_out


class DeadlyImages(TensorImages):
    def load(self, indices, *, epoch):
        if 17 in indices and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(indices, epoch=epoch)


class DeadlyData(BrokenData):
    """Reading the image takes the process with it."""

    def prepare(self):
        train, held_out = super().prepare()
        return DeadlyImages(train.images, train.labels), held_out


class BrokenProjection(Projection):
    def extract(self, images):
        fail(1)
        return super().extract(images)


class BrokenAffinity(TaskAffinity):
    def on_validation_epoch_end(self, trainer, pl_module):
        fail(1)
        super().on_validation_epoch_end(trainer, pl_module)


class BrokenModule(DiTModule):
    def losses(self, *args, **kwargs):
        if self.global_step == 2:
            fail(1)
        return super().losses(*args, **kwargs)


def killed(rank):
    if rank == torch.distributed.get_rank():
        os.kill(os.getpid(), signal.SIGKILL)


CASES = {
    "training step": lambda folder: {"kind": BrokenModule},
    "data": lambda folder: {"data": BrokenData()},
    "data in a worker": lambda folder: {"data": BrokenData(num_workers=1)},
    "validation": lambda folder: {"callbacks": [Fails("on_validation_batch_end")]},
    "callback": lambda folder: {"callbacks": [Fails("on_train_batch_end")]},
    "metrics": lambda folder: {
        "callbacks": [GenerationMetrics(BrokenProjection(), num_images=12, batch_size=4)]
    },
    "affinity": lambda folder: {
        "callbacks": [BrokenAffinity(num_points=3, num_images=12, batch_size=5)]
    },
    "checkpoint": lambda folder: {
        "callbacks": [
            Fails("on_save_checkpoint"),
            Checkpoints(dirpath=folder, every_n_train_steps=1),
        ],
    },
    "worker killed": lambda folder: {"data": DeadlyData(num_workers=1)},
    "killed": lambda folder: {"callbacks": [Fails("on_train_batch_end", fault=killed)]},
    "rank 0 killed": lambda folder: {
        "callbacks": [Fails("on_train_batch_end", rank=0, fault=killed)]
    },
    "rank 0": lambda folder: {"callbacks": [Fails("on_train_batch_end", rank=0)]},
}


def broken(rank, folder, case):
    settings = CASES[case](folder)
    model = module("pcgrad", kind=settings.get("kind", DiTModule), sampler=DDIM(num_steps=2))
    run = trainer(
        ranks=2,
        steps=40,
        callbacks=settings.get("callbacks", []),
        default_root_dir=folder,
        limit_val_batches=1.0,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        enable_checkpointing=case == "checkpoint",
    )
    run.fit(model, datamodule=settings.get("data") or TinyData())


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_end_with_the_first_error(tmp_path, case):
    outcomes = run_ranks(broken, 2, tmp_path / "ranks", tmp_path, case, limit=60, check=False)
    failing, waiting = outcomes if case.startswith("rank 0") else outcomes[::-1]
    if case in {"killed", "rank 0 killed"}:
        assert failing[1] == "exit code -9"
        assert "lost another rank, which was killed or left no error" in waiting[1]
        return
    if case == "worker killed":
        assert "DataLoader worker (pid" in failing[1]
        assert re.search(r"the first error was that of rank 1: .*worker \(pid", waiting[1])
        return
    rank = int(not case.startswith("rank 0"))
    error = f"ValueError: the disk of rank {rank} is full"
    assert error in failing[1]
    assert "ranks: the first error" not in failing[1]
    assert f"ranks: the first error was that of rank {rank}: {error}" in waiting[1]


class Stuck(DiTModule):
    def configure_callbacks(self):
        return [RankWatch(poll=0.1, grace=0.5)]

    def losses(self, *args, **kwargs):
        while self.global_rank == 0:  # as in a collective that does not see that a peer is gone
            time.sleep(0.1)
        fail(1)
        return super().losses(*args, **kwargs)


def stuck(rank):
    trainer(ranks=2).fit(module("uw", kind=Stuck), datamodule=TinyData())


def test_a_rank_that_is_stuck_ends_its_process(tmp_path):
    waiting, failing = run_ranks(stuck, 2, tmp_path, limit=60, check=False)
    assert waiting == (None, "exit code 1")
    assert ERROR in failing[1]


def test_an_error_of_its_own_has_no_first_failure():
    error = RuntimeError("the disk is full")
    assert first_failure(error) is None
    error.add_note("ranks: the first error was that of rank 1: it fell")
    assert first_failure(error) == "ranks: the first error was that of rank 1: it fell"


def test_restarts_that_share_a_store_are_warned_of(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.warns(UserWarning, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        warn_of_shared_store()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    warn_of_shared_store()
