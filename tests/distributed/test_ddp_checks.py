"""Validation, checkpoints, skipped steps and faults under stock DDP."""

import os
import re
import time

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from rank_processes import run_ranks
from tiny_runs import ROUNDING, K, TinyData, fit, module, trainer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from ant_lightning import EMA, ConfigError, ConflictMonitor, PCGrad, multitask_backward
from ant_lightning.errors import DivergedRanksError
from ant_lightning.models.checks import check_strategy


def validated(rank, ranks=2):
    model = module("uw")
    monitor = ConflictMonitor(log_every_n_steps=4, probe_every_n_steps=0)
    run = trainer(
        ranks=ranks,
        steps=4,
        callbacks=[monitor],
        limit_val_batches=1.0,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
    )
    run.fit(model, datamodule=TinyData())
    (losses,) = monitor.state_dict()["history"]["losses"].tolist()
    return {name: float(value) for name, value in run.callback_metrics.items()} | {
        f"train/task_{task}/loss": loss for task, loss in enumerate(losses)
    }


def poisoned(rank, method):
    # Image 17 is in one batch of the first epoch, so on one rank.
    return fit(method, ranks=2, data=TinyData(poisoned=17))


class Drift(L.Callback):
    """Changes one rank behind the others' back after its second step."""

    def __init__(self, what):
        self.what = what

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.global_rank, trainer.global_step) != (1, 2):
            return
        if self.what == "weights":
            pl_module.backbone.late.data[0] += 1e-7
        if self.what == "balancer":
            pl_module.balancer.draw_orders()
        if self.what == "steps":
            pl_module._step.skipped.num_steps += 1


def checkpointed(rank, folder, what):
    model = module("pcgrad")
    checkpoints = ModelCheckpoint(folder / what, every_n_train_steps=1, save_top_k=-1)
    callbacks = [Drift(what), checkpoints, EMA()]
    run = trainer(ranks=2, steps=3, callbacks=callbacks, enable_checkpointing=True)
    try:
        run.fit(model, datamodule=TinyData())
    except DivergedRanksError as error:
        return str(error)
    return None


def drifting(rank, folder):
    drifts = ("nothing", "weights", "balancer", "steps")
    return {what: checkpointed(rank, folder, what) for what in drifts}


def fallen(rank):
    losses_until_now = []

    def losses(rows):
        losses_until_now.append(rows)
        if rank == 1 and len(losses_until_now) == 3:
            raise ValueError("the disk of rank 1 is full")
        return model(x[rows]).square().mean(1)

    model, x = torch.nn.Linear(4, 4), torch.randn(6, 4)
    for _ in range(10):
        multitask_backward(losses, torch.tensor([0, 0, 1, 1, 2, 2]), model.parameters(), PCGrad(3))


def hangs_on_one(rank):
    while rank == 1:
        time.sleep(0.1)
    os._exit(0)  # not to wait for rank 1 at the barrier


def test_validation_covers_every_held_out_image_once(tmp_path):
    first, second = run_ranks(validated, 2, tmp_path)
    one = validated(0, ranks=1)
    assert {"val/loss", "train/loss", *(f"val/task_{i}/loss" for i in range(K))} <= set(one)
    for name, value in one.items():
        if name.startswith("val/") or name.endswith("/loss"):
            assert first[name] == pytest.approx(value, rel=1e-5), name
            assert second[name] == first[name], name


@pytest.mark.parametrize("method", ["vanilla", "uw", "continuous_uw", "pcgrad", "nash"])
def test_a_bad_image_on_one_rank_makes_all_ranks_skip(tmp_path, method):
    first, second = run_ranks(poisoned, 2, tmp_path, method)
    one = fit(method, data=TinyData(poisoned=17))
    assert first["skipped"] == second["skipped"] == one["skipped"] == 1
    assert first["num_updates"] == second["num_updates"] == first["global_step"] == 5
    for name, weight in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=ROUNDING)
        assert torch.equal(first["weights"][name], second["weights"][name])


def test_ranks_that_drifted_apart_are_named_and_no_checkpoint_is_written(tmp_path):
    first, second = run_ranks(drifting, 2, tmp_path / "ranks", tmp_path)
    assert first == second
    assert first["nothing"] is None
    for what, word in [("weights", "weights"), ("balancer", "balancer"), ("steps", "number")]:
        assert word in first[what]
        assert "2 ranks" in first[what]
        assert "step 2" in first[what]
        assert len(list((tmp_path / what).glob("*.ckpt"))) == 1, what
    assert len(list((tmp_path / "nothing").glob("*.ckpt"))) == 3


def test_a_rank_that_fails_does_not_leave_the_other_waiting(tmp_path):
    (_, waiting), (_, failing) = run_ranks(fallen, 2, tmp_path, limit=20, check=False)
    assert "the disk of rank 1 is full" in failing
    # In its first steps all ranks learn of a failure; later gloo says that a peer is gone, in words
    # that depend on how far the call had come.
    said = r"rank 1 failed, and all ranks stop|closed by peer|reset by peer|remote worker"
    assert re.search(said, waiting), waiting[-500:]


def test_a_hang_is_a_failure(tmp_path):
    with pytest.raises(AssertionError, match=r"ranks \[(0, )?1\] hung"):
        run_ranks(hangs_on_one, 2, tmp_path, limit=3.0)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (FSDPStrategy(), ["trainer.strategy", "FSDPStrategy"]),
        (ModelParallelStrategy(), ["ShardedStrategy", "found ModelParallelStrategy"]),
        (DDPStrategy(ddp_comm_hook=fp16_compress_hook), ["ddp_comm_hook", "fp16_compress_hook"]),
    ],
)
def test_strategies_that_would_be_ignored_are_refused(strategy, words):
    with pytest.raises(ConfigError) as error:
        check_strategy(strategy)
    assert all(word in str(error.value) for word in words)
    check_strategy(DDPStrategy(find_unused_parameters=True))
