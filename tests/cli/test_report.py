"""What a report says of the settings of a run."""

import pytest

from ant_lightning.cli.report import _summary


@pytest.mark.parametrize(
    ("ema", "said"),
    [
        ({"decay": 0.999, "lengths": None, "num_snapshots": 32}, "EMA with decay 0.999"),
        (
            {"decay": 0.9, "lengths": [0.05, 0.1], "length": 0.1},
            "EMA with decay 0.9; power-function EMA of lengths 0.05, 0.1; evaluated: length 0.1",
        ),
    ],
)
def test_the_moving_average_has_its_class(ema, said):
    assert f"| moving average | {said} |\n" in _summary({"ema": ema}, {})


def test_a_run_without_averages_has_no_line():
    assert "moving average" not in _summary({"ema": None}, {})
