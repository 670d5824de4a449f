"""Paired intervals, Holm's correction, the choice of a learning rate, frozen weights."""

import json

import numpy as np
import pytest
import torch
import yaml

from ant_lightning import ConfigError, UncertaintyWeighting
from studies import choose, freeze
from studies.results import append_row
from studies.statistics import holm, paired_difference


def test_holm_is_the_hand_computed_case():
    # sorted 0.005 0.01 0.03 0.04 times 4 3 2 1: 0.02 0.03 0.06 0.04, and the running maximum
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_paired_interval_is_the_textbook_one():
    # mean 2, sd 1, n 3: t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3)
    found = paired_difference([1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half))
    # two-sided p of t = 2 sqrt(3) at 2 degrees: 1 - t / sqrt(2 + t²)
    assert found.p_value == pytest.approx(1 - 12**0.5 / 14**0.5)
    assert not found.detected
    assert paired_difference([1.0, 1.1, 0.9]).detected
    assert paired_difference([0.5, 0.5]).p_value == 0
    with pytest.raises(ConfigError, match="must be at least 2, found 1"):
        paired_difference([1.0])


def test_intervals_cover_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(0.3, 1.0, (2000, 8))
    found = [paired_difference(list(row)) for row in draws]
    cover = np.mean([f.low <= 0.3 <= f.high for f in found])
    assert cover == pytest.approx(0.95, abs=0.015)


def test_the_best_run_is_chosen_whatever_the_size_of_a_clusters_loss(tmp_path):
    # Sums of logs: run a 0.1 * 0.01 = 1e-3, run b 0.09 * 0.02 = 1.8e-3 (its plain sum is smaller).
    for name, excess in {"a": [0.1, 0.01], "b": [0.07, 0.02]}.items():
        (tmp_path / name).mkdir()
        append_row(tmp_path / name / "excess_risk.jsonl", {"tasks": {"excess": [9.0, 9.0]}})
        append_row(tmp_path / name / "excess_risk.jsonl", {"tasks": {"excess": excess}})
    candidates = [f"0.001={tmp_path / 'b'}", f"0.002={tmp_path / 'a'}"]
    choose.main(["--output", str(tmp_path), "--yaml", "lr: VALUE", *candidates])
    assert yaml.safe_load((tmp_path / "chosen.yaml").read_text()) == {"lr": 0.002}
    choice = json.loads((tmp_path / "choice.json").read_text())
    assert choice["chosen"] == 0.002
    assert choice["log_excess"]["0.001"] == pytest.approx(np.log(0.07 * 0.02) / 2)
    with pytest.raises(ConfigError, match=r"must hold excess_risk.jsonl"):
        choose.log_excess(tmp_path)


def test_the_best_run_can_be_the_one_with_the_lowest_last_fid(tmp_path):
    for name, fids in {"a": [3.0, 5.0], "b": [9.0, 4.0]}.items():
        (tmp_path / name).mkdir()
        for fid in fids:
            append_row(tmp_path / name / "generation_metrics.jsonl", {"scores": {"fid": fid}})
    candidates = [f"0.1={tmp_path / 'a'}", f"0.2={tmp_path / 'b'}"]
    choose.main(["--output", str(tmp_path), "--yaml", "lr: VALUE", "--metric", "fid", *candidates])
    assert json.loads((tmp_path / "choice.json").read_text()) == {
        "chosen": 0.2,
        "fid": {"0.1": 5.0, "0.2": 4.0},
    }
    with pytest.raises(ConfigError, match=r"must hold generation_metrics.jsonl"):
        choose.last_fid(tmp_path)


def test_frozen_weights_are_those_uncertainty_weighting_ended_with(tmp_path):
    balancer = UncertaintyWeighting(3)
    with torch.no_grad():
        balancer.log_vars.copy_(torch.tensor([-1.0, 0.5, -6.0]))
    state = {f"balancer.{name}": value for name, value in balancer.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    args = ["--checkpoint", str(tmp_path / "x.ckpt"), "--output", str(tmp_path)]
    freeze.main(args)
    content = yaml.safe_load((tmp_path / "frozen.yaml").read_text())
    found = content["model"]["init_args"]["tasks"]["balancer"]
    assert found["class_path"] == "ant_lightning.LinearScalarization"
    np.testing.assert_allclose(found["init_args"]["weights"], balancer.loss_weights(), rtol=1e-6)
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="a checkpoint of uncertainty weighting"):
        freeze.main(args)
