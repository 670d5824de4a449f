"""A run that was stopped and resumed equals the run that was not, bit for bit on the CPU."""

import lightning as L
import pytest
from tiny_fit import BALANCERS, BATCHES, assert_same, fit

STOPS = [1, BATCHES, BATCHES + 1, 2 * BATCHES - 1]


@pytest.mark.parametrize("method", BALANCERS)
def test_resumed_in_an_epoch_at_its_end_and_between_refreshes(tmp_path, method):
    fit(tmp_path / "whole", method=method, steps=9)
    for stop in STOPS:
        on = tmp_path / f"from_{stop}"
        fit(on, method=method, steps=9, resume=tmp_path / "whole" / f"step={stop}.ckpt")
        for step in (stop + 1, 9):
            assert_same(tmp_path / "whole" / f"step={step}.ckpt", on / f"step={step}.ckpt")


class Validations(L.Callback):
    """What each validation found, by step."""

    def __init__(self):
        self.found = {}

    def on_validation_end(self, trainer, pl_module):
        assert trainer.global_step not in self.found
        self.found[trainer.global_step] = float(trainer.callback_metrics["val/loss"])


@pytest.mark.parametrize("interval", [2, 4])
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
