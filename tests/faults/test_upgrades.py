"""Checkpoints of earlier versions load; those of later versions say so.

The file was written by `python tests/faults/test_upgrades.py` at format version 1. It is not to be
written again: a change that breaks it needs a conversion in `modules/saved_state.py`.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script

from tiny_fit import fit

from ant_lightning import (
    EMA,
    ConfigError,
    FixedClustering,
    TimestepClustering,
    partition,
    timestep_costs,
)
from ant_lightning.models.state import FORMAT_VERSION

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "H_checkpoints"
METHODS = ["uw", "nash"]


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_version_1_is_gone_on_with(tmp_path, method):
    path = GOLDEN / f"v1_{method}.ckpt"
    saved = torch.load(path, weights_only=True)
    trainer = fit(tmp_path, method=method, steps=saved["global_step"], resume=path)
    averages = next(c for c in trainer.callbacks if isinstance(c, EMA)).state_dict()
    assert averages["num_updates"] == saved["callbacks"]["EMA"]["num_updates"] == 6
    for name, value in saved["callbacks"]["EMA"]["averages"].items():
        assert torch.equal(averages["averages"][name], value)
    for name, value in trainer.lightning_module.state_dict().items():
        assert torch.equal(value, saved["state_dict"][name])
    # It goes on as it would have: to what was reached then, but for rounding on other machines,
    # of which Adam makes whole steps where a gradient is about 0. So nearly all weights agree.
    trainer = fit(tmp_path, method=method, steps=9, resume=path)
    then = torch.load(GOLDEN / f"v1_{method}_weights.pt", weights_only=True)
    found, wanted, before = (
        torch.cat([state[name].flatten() for name in then if then[name].is_floating_point()])
        for state in (trainer.lightning_module.state_dict(), then, saved["state_dict"])
    )
    assert (found - wanted).norm() < 0.1 * (wanted - before).norm()
    assert (found - wanted).abs().median() < 1e-3 * (wanted - before).abs().median()


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path):
    later = torch.load(GOLDEN / "v1_uw.ckpt", weights_only=True)
    later["ant_lightning"]["format_version"] = FORMAT_VERSION + 1
    torch.save(later, tmp_path / "later.ckpt")
    with pytest.raises(ConfigError, match=r"found 2, written by a newer ant_lightning"):
        fit(tmp_path, method="uw", resume=tmp_path / "later.ckpt")


def test_timestep_clusters_of_0_1_are_refused_by_name_and_can_be_kept(tmp_path):
    """Where clusters cannot be equal, version 0.1 made others than the official ones."""
    old = partition(timestep_costs(100), 7)
    new = TimestepClustering(7)(torch.zeros(100)).boundaries
    assert old != new
    settings = {"method": "vanilla"}
    fit(tmp_path, steps=1, model={"clustering": FixedClustering(old)}, **settings)
    resumed = {"steps": 2, "resume": tmp_path / "step=1.ckpt", **settings}
    with pytest.raises(ConfigError, match=r"tasks\.clustering .*use FixedClustering") as error:
        fit(tmp_path / "new", model={"clustering": TimestepClustering(7)}, **resumed)
    assert str(list(old)) in str(error.value)
    assert str(list(new)) in str(error.value)
    assert "\n" not in str(error.value)
    run = fit(tmp_path / "on", model={"clustering": FixedClustering(old)}, **resumed)
    assert run.global_step == 2
    assert run.lightning_module.clusters.boundaries == old


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    for each in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            module = fit(Path(folder), method=each, steps=9).lightning_module
            checkpoint = torch.load(Path(folder) / "step=6.ckpt", weights_only=True)
            files = next(value for key, value in checkpoint["callbacks"].items() if "Check" in key)
            files |= {key: "" for key, value in files.items() if isinstance(value, str)}
            files["recent"] = []
            torch.save(checkpoint, GOLDEN / f"v{FORMAT_VERSION}_{each}.ckpt")
            torch.save(module.state_dict(), GOLDEN / f"v{FORMAT_VERSION}_{each}_weights.pt")
