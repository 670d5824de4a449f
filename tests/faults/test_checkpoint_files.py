"""Checkpoints on disks that fill up, lose bits, or are cut off in the middle of a write."""

import os
import random
import resource
import zipfile
from contextlib import contextmanager
from datetime import timedelta

import lightning as L
import pytest
import torch
from tiny_fit import assert_same, fit

from ant_lightning import Checkpoints, ConfigError
from ant_lightning.errors import CheckpointWriteError, FileError
from ant_lightning.runtime.checkpoint_files import (
    AtomicCheckpointIO,
    furthest_whole,
    read_whole_checkpoint,
)


@contextmanager
def full_disk():
    """Inside, no file can grow beyond 2,000 bytes: the system refuses as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FullDisk(L.Callback):
    """The disk is full from one step to another, as the checkpoint callback sees it."""

    def __init__(self, start, stop):
        self.steps = range(start, stop)
        self._full = full_disk()

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.steps.start:
            self._full.__enter__()
        if trainer.global_step == self.steps.stop:
            self._full.__exit__(None, None, None)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, **content):
    needed = {"pytorch-lightning_version": "2.6.0", "state_dict": {}, "global_step": 7}
    AtomicCheckpointIO().save_checkpoint({**needed, **content}, path)


def test_a_save_that_fails_costs_a_warning_and_the_next_one_makes_up_for_it(tmp_path):
    with pytest.warns(UserWarning, match=r"ckpt: could not be written: File too large"):
        trainer = fit(tmp_path, steps=6, callbacks=[FullDisk(3, 5)], checkpoint={"save_top_k": 1})
    assert trainer.global_step == 6
    assert names(tmp_path) == ["last.ckpt", "step=5.ckpt", "step=6.ckpt"]
    fit(tmp_path / "whole", steps=6)
    assert_same(tmp_path / "last.ckpt", tmp_path / "whole" / "last.ckpt")


def test_the_last_good_checkpoint_survives_a_disk_that_stays_full(tmp_path):
    full = FullDisk(3, 7)
    try:
        with (
            pytest.warns(UserWarning, match="earlier checkpoints are kept"),
            pytest.raises(CheckpointWriteError, match=r"last\.ckpt"),
        ):
            fit(tmp_path, steps=6, callbacks=[full], checkpoint={"save_top_k": 1})
    finally:
        full._full.__exit__(None, None, None)
    assert names(tmp_path) == ["last.ckpt", "step=1.ckpt", "step=2.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_file_is_never_replaced_by_a_part_of_one(tmp_path):
    path = tmp_path / "last.ckpt"
    write(path, weights=torch.ones(10))
    with full_disk(), pytest.raises(CheckpointWriteError, match="could not be written"):
        write(path, weights=torch.ones(10_000))
    assert names(tmp_path) == ["last.ckpt"]
    assert torch.load(path, weights_only=True)["weights"].sum() == 10


@pytest.mark.parametrize("damage", ["empty", "cut off", "one bit", "not a checkpoint"])
def test_damaged_files_are_passed_over_by_name(tmp_path, damage):
    for i in range(3):
        write(tmp_path / f"{i}.ckpt", weights=torch.full((500,), i))
        os.utime(tmp_path / f"{i}.ckpt", (i, i))
    path = tmp_path / "2.ckpt"
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        part = max(zipfile.ZipFile(path).infolist(), key=lambda part: part.file_size)
        content[part.header_offset + 500] ^= 4
    damaged = {"empty": b"", "cut off": content[:-1], "not a checkpoint": b"x" * 3000}
    path.write_bytes(damaged.get(damage, content))
    os.utime(path, (9, 9))
    with pytest.warns(UserWarning, match=r"skipped .*/2\.ckpt: (truncated|damaged)"):
        found, _ = furthest_whole(tmp_path.glob("*.ckpt"))
    assert found == tmp_path / "1.ckpt"
    with pytest.raises(ConfigError, match=r".*2\.ckpt: (truncated|damaged)"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    path = tmp_path / "a.ckpt"
    write(path, weights=torch.arange(300.0), step=7, name="run")
    whole, draw = path.read_bytes(), random.Random(0)
    found = 0
    for _ in range(600):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            read_whole_checkpoint(path)
        except FileError:
            found += 1
        else:
            loaded = torch.load(path, weights_only=True)
            assert torch.equal(loaded["weights"], torch.arange(300.0))
            assert (loaded["step"], loaded["name"]) == (7, "run")
    assert found > 300


def test_the_newest_stay_and_the_leftovers_of_a_killed_run_go(tmp_path):
    (tmp_path / f".last.ckpt.{2**22 + 1}.tmp").write_bytes(b"half")  # no process has this number
    fit(tmp_path, steps=6, checkpoint={"save_top_k": 1, "keep_last": 3})
    assert names(tmp_path) == ["last.ckpt", *(f"step={i}.ckpt" for i in (4, 5, 6))]
    fit(
        tmp_path,
        steps=8,
        resume=tmp_path / "step=6.ckpt",
        checkpoint={"save_top_k": 1, "keep_last": 3},
    )
    assert names(tmp_path) == ["last.ckpt", *(f"step={i}.ckpt" for i in (6, 7, 8))]


def test_checkpoints_by_time(tmp_path):
    fit(tmp_path / "now", steps=3, checkpoint={"train_time_interval": timedelta(0)})
    assert names(tmp_path / "now") == ["last.ckpt", *(f"step={i}.ckpt" for i in (1, 2, 3))]
    fit(tmp_path / "later", steps=3, checkpoint={"train_time_interval": timedelta(hours=9)})
    assert names(tmp_path / "later") == ["last.ckpt", "step=3.ckpt"]


def test_one_checkpoint_at_least():
    with pytest.raises(ConfigError, match=r"keep_last: must be at least 1, found 0"):
        Checkpoints(keep_last=0)
