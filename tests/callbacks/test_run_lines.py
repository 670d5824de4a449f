"""What a run says of itself, and what a run that is finished already leaves alone."""

import re

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tiny_fit import BATCHES, fit

from ant_lightning import Dashboard
from ant_lightning.callbacks.run_lines import RunLines

SAID = re.compile(r"fit: the first validation would be at step (\d+), so this run shows no")


@pytest.mark.parametrize(
    ("steps", "settings", "first"),
    [
        (2, {"val_interval": 3}, 3),
        (3, {"val_interval": 3}, None),
        (2, {"limit_val_batches": 1.0}, BATCHES),
        (5, {"limit_val_batches": 1.0, "check_val_every_n_epoch": 2}, 2 * BATCHES),
        (5, {"limit_val_batches": 1.0, "val_check_interval": 0.5}, None),
        (2, {}, None),  # without validation
    ],
)
def test_a_run_that_ends_before_its_first_validation_says_so(
    tmp_path, capsys, steps, settings, first
):
    fit(tmp_path, method="uw", steps=steps, every=10, callbacks=[RunLines()], **settings)
    found = SAID.findall(capsys.readouterr().out)
    assert found == ([] if first is None else [str(first)])


def test_a_finished_run_that_is_resumed_logs_nothing(tmp_path, capsys):
    def values(resume=None):
        logger = TensorBoardLogger(str(tmp_path), name="", version="run")
        fit(tmp_path, steps=2, callbacks=[RunLines(), Dashboard()], logger=logger, resume=resume)
        # Lightning makes the file itself.
        newest = max(tmp_path.rglob("events*"), key=lambda path: path.name)
        return [v.tag for event in EventFileLoader(str(newest)).Load() for v in event.summary.value]

    assert "0_how_to_read/text_summary" in values()
    assert values(tmp_path / "last.ckpt") == []
    assert "fit: nothing left to train, the checkpoint is at step 2" in capsys.readouterr().out
