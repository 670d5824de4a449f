import json
import math

import pytest
import torch

from ant_lightning import ConfigError, TransferGapResult, frechet_distance, negative_transfer_gap
from ant_lightning.generation.frechet import GaussianStatistics
from ant_lightning.transfer.gap import GapEstimate
from ant_lightning.transfer.result import IntervalGap


def mean(losses):
    return float(losses.mean())


def test_pairing_takes_out_what_both_models_share():
    generator = torch.Generator().manual_seed(0)
    hard = 10 * torch.rand(400, generator=generator, dtype=torch.float64)  # images differ a lot
    own = torch.randn(400, generator=generator, dtype=torch.float64) * 0.1
    (gap,) = negative_transfer_gap([hard - 0.05 + own], hard, statistic=mean, num_resamples=2000)
    assert gap.value == pytest.approx(float(own.mean()) - 0.05, rel=1e-9)
    # The normal interval of the mean difference; unpaired it would be 40 times as wide.
    half = 1.96 * float(own.std()) / 20
    assert gap.high - gap.low == pytest.approx(2 * half, rel=0.1)
    assert gap.low < gap.value < gap.high < 0


def test_interval_covers_the_truth_as_often_as_it_claims():
    covered = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        difference = 0.3 + torch.randn(60, generator=generator, dtype=torch.float64)
        (gap,) = negative_transfer_gap(
            [difference], torch.zeros(60), statistic=mean, num_resamples=200, seed=seed
        )
        covered += gap.low <= 0.3 <= gap.high
    assert covered >= 51  # 57 are expected, with a standard deviation of 1.7


def test_distance_of_features_lies_inside_its_interval():
    """A resample has fewer distinct rows, which alone raises a Fréchet distance by a lot here."""
    generator = torch.Generator().manual_seed(1)
    real = GaussianStatistics.from_features(torch.randn(500, 8, generator=generator))
    noise = torch.randn(30, 8, generator=generator)

    def distance(features):
        return frechet_distance(GaussianStatistics.from_features(features), real)

    near, narrow = negative_transfer_gap(
        [noise + 0.1, noise * 0.5], noise + 0.4, statistic=distance, num_resamples=300
    )
    assert near.value == pytest.approx(distance(noise + 0.1) - distance(noise + 0.4))
    assert near.low < near.value < near.high < 0
    # The narrow set's distance rises less, so draws that were not moved would all lie to the left.
    assert narrow.high - narrow.value > 0.5 * (narrow.value - narrow.low)


def test_without_resamples_there_is_no_interval():
    (gap,) = negative_transfer_gap([torch.ones(3)], torch.zeros(3), statistic=mean, num_resamples=0)
    assert gap.value == 1
    assert math.isnan(gap.low)
    assert math.isnan(gap.high)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_resamples": -1}, "num_resamples"),
        ({"confidence": 1.0}, "confidence"),
        ({"specialists": []}, "at least one"),
        ({"specialists": [torch.zeros(4)]}, r"found shapes \[\(4,\)\] and \(5,\)"),
        ({"multitask": torch.zeros(1), "specialists": [torch.zeros(1)]}, "2 or more"),
    ],
)
def test_bad_settings_are_named(settings, words):
    given = {"specialists": [torch.zeros(5)], "multitask": torch.zeros(5), "statistic": mean}
    given |= settings
    with pytest.raises(ConfigError, match=words):
        negative_transfer_gap(given.pop("specialists"), given.pop("multitask"), **given)


def result():
    gap = GapEstimate(-1.0, -1.5, 0.5)
    fid = {"multitask_fid": 3.0, "specialist_fid": 2.0, "fid_gap": gap}
    gaps = [
        IntervalGap(
            start=start,
            stop=stop,
            budget=budget,
            specialist_steps=7,
            multitask_loss=0.5,
            specialist_loss=0.4,
            loss_gap=GapEstimate(-0.1, -0.15, -0.05),
            **with_fid,
        )
        for budget, with_fid in [("iterations", fid), ("samples", {})]
        for start, stop in [(30, 100), (0, 30)]
    ]
    return TransferGapResult(
        gaps=tuple(gaps),
        multitask_steps=9,
        num_images=20,
        num_held_out=10,
        sampler_steps=12,
        sampler_steps_unshared=20,
    )


def test_a_result_survives_its_file_and_its_row(tmp_path):
    measured = result()
    measured.save(tmp_path / "gap.json")
    for again in (
        TransferGapResult.load(tmp_path / "gap.json"),
        TransferGapResult.from_row(measured.row()),
    ):
        assert repr(again) == repr(measured)  # NaN is not equal to itself
    assert measured.row()["gaps"][2]["fid_gap"] == [None, None, None]
    assert measured.budgets == ["iterations", "samples"]
    assert [gap.start for gap in measured.of_budget("samples")] == [0, 30]
    assert measured.gaps[0].relative_loss_gap.low == pytest.approx(-0.3)


def test_a_row_without_columns_that_came_later_is_read():
    row = result().row()
    for gap in row["gaps"]:
        del gap["fid_gap"]
    gaps = TransferGapResult.from_row(row).gaps
    assert all(math.isnan(gap.fid_gap.value) for gap in gaps)
    del row["gaps"][0]["loss_gap"]
    with pytest.raises(ConfigError, match="loss_gap"):
        TransferGapResult.from_row(row)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "text.json").write_text("no")
    (tmp_path / "other.json").write_text(json.dumps({**result().row(), "num_images": "3"}))
    for name in ("text.json", "other.json", "missing.json"):
        with pytest.raises(ConfigError, match=name):
            TransferGapResult.load(tmp_path / name)
