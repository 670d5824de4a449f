"""Runs on two ranks that were stopped go on exactly, and on another number of ranks as they can."""

import os
import signal
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rank_processes import run_ranks
from tiny_fit import assert_same
from tiny_runs import ROUNDING, PartlyUsed, TinyData, module, trainer
from torch import nn

from ant_lightning import EMA, Checkpoints, Reclustering

STEPS = 7  # 5 in an epoch
# Where a run is stopped, by method: within an epoch and at its end.
STOPS = {"vanilla": [2, 5], "uw": [5], "continuous_uw": [2], "pcgrad": [2, 5], "nash": [2, 5]}
CHANGED = ["uw", "pcgrad", "nash"]  # whose number of ranks is changed


class Forgetful(PartlyUsed):
    """Draws masks of its own, other ones on each rank."""

    def __init__(self):
        super().__init__()
        self.forget = nn.Dropout(0.2)

    def forward(self, x, timesteps, labels=None):
        return super().forward(self.forget(x), timesteps, labels)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)


def run(folder, method, *, ranks=2, resume=None, steps=STEPS, callbacks=(), workers=0, **settings):
    """Train with checkpoints around the stops and at the end."""
    checkpoints = Checkpoints(dirpath=folder, at_steps=[2, 3, 5, 6], save_last=True)
    fit = trainer(
        ranks=ranks,
        steps=steps,
        callbacks=[EMA(decay=0.9, lengths=[0.1], snapshot_every=2), *callbacks, checkpoints],
        enable_checkpointing=True,
        default_root_dir=folder,
        plugins=settings.pop("plugins", None),
    )
    data = TinyData()
    data.num_workers = workers
    fit.fit(module(method, lr_scheduler=cosine, **settings), datamodule=data, ckpt_path=resume)


def with_state(method):
    """What makes a run hard to resume, shared among the methods; on one rank each has it all."""
    settings = {"backbone": Forgetful()}
    if method in {"vanilla", "nash"}:
        settings["workers"] = 1
    if method in {"uw", "nash"}:
        settings["callbacks"] = [Reclustering(recluster_every=4, num_points=6, num_images=4)]
    if method in {"continuous_uw", "pcgrad"}:
        settings["plugins"] = [MixedPrecision("16-mixed", device="cpu")]
    if method == "nash":
        settings["placement"] = "sorted"
    return settings


class Kill(L.Callback):
    """Rank 1 alone is told to stop."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def told_to_stop(folder):
    try:
        run(folder, "pcgrad", steps=100, callbacks=[Kill()])
    except SIGTERMException:
        return True
    return False


def said(function, *args, **settings):
    """The warnings of a run."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function(*args, **settings)
    return [str(each.message) for each in found if "number of ranks" in str(each.message)]


def on_two_ranks(rank, folder):
    for method, stops in STOPS.items():
        run(folder / method / "whole", method, **with_state(method))
        for stop in stops:
            resume = folder / method / "whole" / f"step_{stop}.ckpt"
            run(folder / method / f"from_{stop}", method, resume=resume, **with_state(method))
    for method in CHANGED:
        run(folder / method / "plain", method)
    stopped = told_to_stop(folder / "stopped")
    return stopped, said(run, folder / "from_one", "pcgrad", resume=folder / "one" / "step_3.ckpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def two_ranks(folder):
    run(folder / "one", "pcgrad", ranks=1)
    return run_ranks(on_two_ranks, 2, folder / "ranks", folder, limit=180)


@pytest.mark.parametrize("method", STOPS)
def test_two_ranks_resume_to_the_last_bit(two_ranks, folder, method):
    whole = folder / method / "whole"
    for stop in STOPS[method]:
        for name in (f"step_{stop + 1}.ckpt", "last.ckpt"):
            assert_same(whole / name, folder / method / f"from_{stop}" / name)
    history = torch.load(whole / "last.ckpt", weights_only=True)["ant_lightning"]["cluster_history"]
    assert len({tuple(each) for _, each in history}) == 1 + (method in {"uw", "nash"})


def weights(path):
    saved = torch.load(path, weights_only=True)
    ema = saved["callbacks"]["EMA"]
    kinds = {"average": ema["averages"], "average of length 0.1": ema["powers"][0.1]}
    return saved["state_dict"] | {
        f"{kind} of {name}": value for kind, one in kinds.items() for name, value in one.items()
    }


def assert_close(path, other):
    ours, theirs = weights(path), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=ROUNDING, msg=name)


@pytest.mark.parametrize("method", CHANGED)
def test_one_process_goes_on_from_two_ranks(two_ranks, folder, method):
    resume = folder / method / "plain" / "step_3.ckpt"
    on = folder / method / "on_one"
    with pytest.warns(UserWarning, match="number of ranks: the checkpoint has 2, this run 1: the "):
        run(on, method, ranks=1, resume=resume)
    assert_close(on / "last.ckpt", folder / method / "plain" / "last.ckpt")


def test_two_ranks_go_on_from_one_process_and_say_what_is_not_the_same(two_ranks, folder):
    (_, first), (_, second) = two_ranks
    assert second == []
    (line,) = first
    assert line == (
        "number of ranks: the checkpoint has 1, this run 2: the batch of a step has the same "
        "images, timesteps and noise, but sums are rounded in another order, so results are no "
        "longer the same bit for bit"
    )
    assert_close(folder / "from_one" / "last.ckpt", folder / "one" / "last.ckpt")


def test_what_depends_on_the_number_of_ranks_beside_rounding_is_said(two_ranks, folder):
    settings = with_state("nash") | {"callbacks": [], "steps": 4}
    resume = folder / "nash" / "whole" / "step_3.ckpt"
    found = said(run, folder / "other", "nash", ranks=1, resume=resume, **settings)
    assert any("'sorted' pairs images with other timesteps and dropout" in line for line in found)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(two_ranks, folder):
    assert [stopped for stopped, _ in two_ranks] == [True, True]
    saved = torch.load(folder / "stopped" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 8
