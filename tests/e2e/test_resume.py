"""A run that was stopped and resumed equals the run that was not, bit for bit on the CPU."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from tiny_fit import BALANCERS, BATCHES, Forgetful, assert_same, fit

from ant_lightning import Reclustering

STOPS = [1, BATCHES, BATCHES + 1, 2 * BATCHES - 1]


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)


def everything_that_has_a_state(folder, **settings):
    """Dropout, a scheduler, workers, clusters that change, a scaler, a logger."""
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    return fit(
        folder,
        steps=9,
        workers=1,
        callbacks=[Reclustering(recluster_every=5, num_points=8, num_images=4)],
        model={"kind": Forgetful, "lr_scheduler": cosine, "warmup_steps": 0},
        logger=logger,
        log_every_n_steps=1,
        plugins=[MixedPrecision("16-mixed", device="cpu")],
        default_root_dir=folder,
        **settings,
    )


def logged(folder, *, after):
    """Every number that was logged after a step, by step and name."""
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    steps = [int(row[header.index("step")]) for row in rows]
    return {
        (step, name): value
        for step, row in zip(steps, rows, strict=True)
        for name, value in zip(header, row, strict=True)
        if value and step > after and name != "epoch"
    }


QUICK = {"vanilla", "uw", "pcgrad"}  # no balancer, one of losses, one of gradients
CASES = [pytest.param(method, STOPS, marks=pytest.mark.slow) for method in BALANCERS]
# Gradients have the most state; the others stop at the end of an epoch and after it.
CASES += [(method, STOPS if method == "pcgrad" else STOPS[1:3]) for method in sorted(QUICK)]


@pytest.mark.parametrize(("method", "stops"), CASES)
def test_resumed_in_an_epoch_at_its_end_and_between_refreshes(tmp_path, method, stops):
    whole = everything_that_has_a_state(tmp_path / "whole", method=method)
    history = whole.lightning_module.cluster_history
    assert [step for step, _ in history] == [0, 5]
    assert history[0][1] != history[1][1]
    for stop in stops:
        on = tmp_path / f"from_{stop}"
        resume = tmp_path / "whole" / f"step={stop}.ckpt"
        everything_that_has_a_state(on, method=method, resume=resume)
        for step in (stop + 1, 9):
            assert_same(tmp_path / "whole" / f"step={step}.ckpt", on / f"step={step}.ckpt")
        assert logged(on, after=stop) == logged(tmp_path / "whole", after=stop) != {}


class Validations(L.Callback):
    """What each validation found, by step."""

    def __init__(self):
        self.found = {}

    def on_validation_end(self, trainer, pl_module):
        assert trainer.global_step not in self.found
        self.found[trainer.global_step] = float(trainer.callback_metrics["val/loss"])


@pytest.mark.parametrize("interval", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_resumed_around_a_validation(tmp_path, interval):
    validations = Validations()
    fit(tmp_path / "whole", steps=9, val_interval=interval, callbacks=[validations])
    assert sorted(validations.found) == list(range(interval, 9, interval))
    for stop in (3, 4, 5):
        on, again = tmp_path / f"from_{stop}", Validations()
        resume = tmp_path / "whole" / f"step={stop}.ckpt"
        fit(on, steps=9, val_interval=interval, resume=resume, callbacks=[again])
        assert_same(tmp_path / "whole" / "step=9.ckpt", on / "step=9.ckpt")
        assert again.found == {k: v for k, v in validations.found.items() if k > stop}
