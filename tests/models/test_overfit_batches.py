"""`trainer.overfit_batches` trains on the same few batches in every epoch."""

import lightning as L
import pytest
import torch
from tiny_fit import BATCHES, fit

from ant_lightning import ConfigError, DigitsData


class Seen(L.Callback):
    """The batches of training and of validation."""

    def __init__(self):
        self.train = []
        self.val = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train.append(batch.images)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.val.append(batch.images)


def assert_repeats(batches, period):
    for i, batch in enumerate(batches):
        assert torch.equal(batch, batches[i % period]), i
    for i in range(1, period):
        assert not torch.equal(batches[0], batches[i])


@pytest.mark.parametrize(
    ("wanted", "period", "workers"),
    [(1, 1, 0), (2, 2, 1), (0.5, BATCHES // 2, 0), (1.0, BATCHES, 0), (99, BATCHES, 0)],
)
def test_the_same_batches_come_in_every_epoch(tmp_path, wanted, period, workers):
    seen = Seen()
    steps = 2 * period + 1
    fit(tmp_path, steps=steps, callbacks=[seen], overfit_batches=wanted, workers=workers)
    assert len(seen.train) == steps
    assert_repeats(seen.train, period)


def test_a_run_that_is_resumed_goes_on_with_them(tmp_path):
    first, second = Seen(), Seen()
    fit(tmp_path, steps=3, callbacks=[first], overfit_batches=2)
    resume = tmp_path / "step=3.ckpt"
    fit(tmp_path, steps=6, callbacks=[second], overfit_batches=2, resume=resume)
    assert_repeats(first.train + second.train, 2)


def test_validation_has_as_many_of_the_held_out_batches_in_their_order(tmp_path):
    seen = Seen()
    fit(tmp_path, steps=2, callbacks=[seen], overfit_batches=1, val_interval=1)
    data = DigitsData(batch_size=300)
    data.setup("fit")
    (expected,) = (batch.images for _, batch in zip(range(1), data.val_dataloader(), strict=False))
    assert_repeats(seen.val, 1)
    assert torch.equal(seen.val[0], expected)


def test_less_than_a_batch_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"overfit_batches: must be at least one of the 4 .* 0\.1"
    ):
        fit(tmp_path, steps=2, overfit_batches=0.1)
