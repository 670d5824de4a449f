import json

import pytest
from tiny_digits import module, trainer

from ant_lightning import ConfigError, DigitsData, StepCost


def test_cost_of_steps_is_written(tmp_path):
    run = trainer(tmp_path, StepCost(skip_steps=2), steps=5, limit_val_batches=0)
    run.fit(module(), DigitsData(batch_size=16))
    row = json.loads((tmp_path / "step_cost.json").read_text())
    assert row["num_steps"] == 3
    assert row["iterations_per_second"] > 0
    assert 0.05 < row["peak_memory_gb"] < 50  # torch alone is 0.2 GB
    assert row["memory_of"] == "process, no GPU"
    with pytest.raises(ConfigError, match="skip_steps"):
        StepCost(skip_steps=-1)


def test_a_run_with_nothing_left_to_time_writes_no_time_and_keeps_an_earlier_one(tmp_path):
    for skipped, timed in [(2, None), (1, 1), (2, 1)]:
        run = trainer(tmp_path, StepCost(skip_steps=skipped), steps=2, limit_val_batches=0)
        run.fit(module(), DigitsData(batch_size=16))
        row = json.loads((tmp_path / "step_cost.json").read_text())
        assert (row["iterations_per_second"] is None) == (timed is None)
        assert row["num_steps"] == (timed or 0)
        assert row["peak_memory_gb"] > 0.05
