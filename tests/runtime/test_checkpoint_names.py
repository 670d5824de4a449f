"""How checkpoints are called, and that those asked for by step are kept."""

import pytest
from tiny_fit import fit

from ant_lightning import Checkpoints


def names(folder):
    return sorted(path.stem for path in folder.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("step_{step}", "step_800"),
        ("step={step}", "step=800"),
        ("run-{epoch}-step_{step:06d}", "run-2-step_000800"),
        ("{step}", "step=800"),
        ("{epoch}-{step}", "epoch=2-step=800"),
    ],
)
def test_a_name_that_the_pattern_spells_out_is_not_put_in_twice(pattern, name):
    checkpoints = Checkpoints(filename=pattern)
    assert checkpoints.format_checkpoint_name({"step": 800, "epoch": 2}) == f"{name}.ckpt"


def test_what_at_steps_asks_for_is_kept_and_is_one_file(tmp_path):
    settings = {"filename": "step_{step}", "save_top_k": 1, "at_steps": [2, 4, 6]}
    fit(tmp_path, steps=6, checkpoint=settings, method="vanilla")
    assert names(tmp_path) == ["last", "step_2", "step_4", "step_5", "step_6"]


def test_files_of_the_old_names_roll_off_after_a_resume(tmp_path):
    old = {"filename": "step_step={step}", "save_top_k": 1}
    fit(tmp_path, steps=3, checkpoint=old, method="vanilla")
    assert names(tmp_path) == ["last", "step_step=2", "step_step=3"]
    settings = {"filename": "step_{step}", "save_top_k": 1}
    fit(
        tmp_path,
        steps=6,
        checkpoint=settings,
        method="vanilla",
        resume=tmp_path / "step_step=3.ckpt",
    )
    assert names(tmp_path) == ["last", "step_5", "step_6"]
