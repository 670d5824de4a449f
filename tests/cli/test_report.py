"""What a report says of the settings of a run."""

import json

import pytest

from ant_lightning import GenerationMetrics
from ant_lightning.cli.report import _shares, _summary
from ant_lightning.cli.report_scores import scores_section


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


WITH_SCORES = {"trainer": {"callbacks": "ant_lightning.GenerationMetrics"}}


@pytest.mark.parametrize(
    ("config", "is_off", "why"),
    [
        ({"scores": False}, True, "the run was told `--scores false`"),
        ({"trainer": {"callbacks": None}}, True, "has no `ant_lightning.GenerationMetrics`"),
        (WITH_SCORES, False, "no validation with scores has ended"),
        (WITH_SCORES, True, "the network that scores had no weights"),
    ],
)
def test_a_report_without_scores_says_why(config, is_off, why, tmp_path):
    scores = GenerationMetrics(None, num_images=9)
    scores._is_off = is_off
    state = {"callbacks": {scores.state_key: scores.state_dict()}}
    assert why in scores_section(tmp_path, config, state)


def test_the_scale_of_kid_is_said_where_it_stands(tmp_path):
    for scores, said in (({"kid": -1.21}, True), ({"fid": 3.0}, False)):
        (tmp_path / "generation_metrics.jsonl").write_text(json.dumps({"scores": scores}) + "\n")
        assert ("without the factor of 1,000" in scores_section(tmp_path, {}, {})) is said


def test_shares_of_the_weights_are_100_percent_together():
    points = _shares([(50, 0.3), (50, 0.3), (50, 0.3), None])
    assert [each and each[0] for each in points] == [50, 50, 50, None]
    assert sum(each[1] for each in points if each) == pytest.approx(100)
    assert max(each[1] for each in points if each) == 33.4
