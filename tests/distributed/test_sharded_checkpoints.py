"""Checkpoints whose shards `torch.distributed.checkpoint` writes, read by any number of ranks."""

import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from rank_processes import needs_unused_shards, run_ranks
from test_fsdp2 import largest_difference, run
from tiny_runs import ROUNDING, PartlyUsed, TinyData, module, trainer

from ant_lightning import ShardedStrategy, load_official_checkpoint
from ant_lightning.errors import CheckpointWriteError, FileError
from ant_lightning.runtime.checkpoint_files import (
    furthest_whole,
    read_whole_checkpoint,
    remove_unfinished,
)

HSDP = {"num_replicas": 2}
pytestmark = needs_unused_shards


def on_four(rank, folder):
    """A run of 2 replicas of 2 shards, and the same, resumed in its middle."""
    whole = run(4, "nash", folder / "four", steps=4, strategy=HSDP)
    resumed = run(4, "nash", resume=folder / "four" / "step_3.ckpt", steps=4, strategy=HSDP)
    return whole, resumed


def refused_write(folder):
    """Rank 1 may not write more than 100 bytes to a file; what the ranks are told."""
    fit = trainer(ranks=2, steps=1, strategy=ShardedStrategy())
    fit.fit(module("vanilla"), TinyData())
    path = folder / "refused" / "x.ckpt"
    fit.save_checkpoint(path)
    first = read_whole_checkpoint(path)["state_dict"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if fit.global_rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(CheckpointWriteError) as error:
            fit.save_checkpoint(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    torch.distributed.barrier()
    again = read_whole_checkpoint(path)["state_dict"]
    return str(error.value), all(torch.equal(first[name], again[name]) for name in first)


def on_two(rank, folder):
    step_3 = folder / "four" / "step_3.ckpt"
    resumed = run(2, "nash", folder / "two", resume=step_3, steps=4)
    one_file = {"save_distributed_checkpoint": False}
    run(2, "nash", folder / "file", resume=step_3, steps=4, strategy=one_file)
    from_file = run(2, "nash", resume=folder / "one" / "step_3.ckpt", steps=4)
    return resumed, from_file, refused_write(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def one(folder):
    return run(1, "nash", folder / "one", steps=4, sharded=False)


@pytest.fixture(scope="module")
def four(folder):
    return run_ranks(on_four, 4, folder / "ranks of four", folder, limit=180)


@pytest.fixture(scope="module")
def two(folder, one, four):
    return run_ranks(on_two, 2, folder / "ranks of two", folder, limit=180)


def differences(found, expected):
    return max(largest_difference(found[name], expected[name]) for name in ("weights", "averages"))


def test_replicas_train_as_one_process_does_and_resume_to_the_last_bit(one, four):
    for whole, resumed in four:
        assert differences(whole, one) < ROUNDING
        assert whole["val/loss"] == pytest.approx(one["val/loss"], rel=1e-3)
        assert differences(resumed, whole) == 0
        assert resumed["balancer"] == whole["balancer"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_other_numbers_of_ranks_go_on(folder, one, four, two):
    found = [resumed for resumed, _, _ in two]
    step_3 = folder / "four" / "step_3.ckpt"
    for own in (folder / "on one", None):  # without `Checkpoints`, Lightning itself reads the file
        with pytest.warns(UserWarning, match="number of ranks: the checkpoint has 4, this run 1"):
            found.append(run(1, "nash", own, resume=step_3, steps=4, sharded=False))
    for each in found:
        assert each["step"] == 4
        assert differences(each, four[0][0]) < ROUNDING
    for _, from_file, _ in two:  # which one process without shards wrote
        assert differences(from_file, one) < ROUNDING


def flat(value, name=""):
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, each in items for k, v in flat(each, f"{name}/{key}").items()}
    return {name: value}


def test_shards_and_one_file_hold_the_same(folder, two):
    shards, file = (flat(read_whole_checkpoint(folder / n / "last.ckpt")) for n in ("two", "file"))
    assert shards.keys() == file.keys()
    for name, value in shards.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, file[name]), name
    assert "/optimizer_states/0/state/0/exp_avg" in shards


def test_a_rank_that_cannot_write_leaves_the_earlier_checkpoint(two):
    for *_, (message, kept) in two:
        assert "x.ckpt: could not be written" in message
        assert "File too large" in message
        assert kept


def test_a_module_reads_shards_without_ranks(folder, four):
    path = folder / "four" / "last.ckpt"
    backbone = PartlyUsed()
    load_official_checkpoint(backbone, path, weights="model")
    for name, value in backbone.named_parameters():
        assert torch.equal(value, four[0][0]["weights"][name])


@pytest.fixture
def copied(folder, four, tmp_path):
    return Path(shutil.copytree(folder / "four", tmp_path / "copied"))


def shards_of(path):
    content = torch.load(path, weights_only=True)
    return path.with_name(content["shards"]["folder"])


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_shards_are_never_read(copied):
    last = copied / "last.ckpt"
    damage(next(shards_of(last).glob("__1_*")))
    with pytest.raises(FileError, match=r"__1_0\.distcp: damaged"):
        read_whole_checkpoint(last)
    with pytest.warns(UserWarning, match="skipped .*damaged"):
        path, content = furthest_whole(copied.glob("*.ckpt"))
    assert path.name.endswith("-step=4.ckpt")
    assert content["global_step"] == 4


def test_missing_shards_are_named(copied):
    last = copied / "last.ckpt"
    name = shards_of(last).rename(copied / "moved").name
    assert name == "moved"
    with pytest.raises(FileError, match=r"last\.ckpt: needs the folder last\.ckpt\.shards\S+ besi"):
        read_whole_checkpoint(last)


class Call:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def with_index(path, index):
    """Another index, with the checksum that the file says."""
    content = torch.load(path, weights_only=True)
    file = shards_of(path) / ".metadata"
    file.write_bytes(pickle.dumps(index))
    from ant_lightning.files.checkpoint_shards import _checksum

    content["shards"]["files"][".metadata"] = [file.stat().st_size, _checksum(file)]
    torch.save(content, path)


def test_an_index_that_would_run_code_or_leave_its_folder_is_refused(copied):
    last = copied / "last.ckpt"
    index = pickle.loads((shards_of(last) / ".metadata").read_bytes())
    with_index(last, Call(copied / "made"))
    with pytest.raises(FileError, match=r"refused, because reading it would call posix\.mkdir"):
        read_whole_checkpoint(last)
    assert not (copied / "made").exists()
    info = next(iter(index.storage_data.values()))
    inside, info.relative_path = info.relative_path, "../step_3.ckpt"
    with_index(last, index)
    with pytest.raises(FileError, match=r"refused, it points to \.\./step_3\.ckpt"):
        read_whole_checkpoint(last)
    info.relative_path = inside
    stored = next(iter(index.state_dict_metadata.values()))
    stored.size = torch.Size([1 << 40])
    with_index(last, index)
    with pytest.raises(FileError, match=r"a tensor says the shape \[1099511627776\]"):
        read_whole_checkpoint(last)
    content = torch.load(last, weights_only=True)
    content["shards"]["folder"] = "../elsewhere"
    torch.save(content, last)
    with pytest.raises(FileError, match="must name the files of its shards"):
        read_whole_checkpoint(last)


def test_only_shards_that_no_checkpoint_names_are_removed(copied):
    """What a kill leaves behind: a folder of a process that has ended, or of this one."""
    kept = {each.name for each in copied.iterdir()}
    (copied / "last.ckpt").rename(copied / "renamed.ckpt")
    kept = (kept - {"last.ckpt"}) | {"renamed.ckpt"}
    alive = f"last.ckpt.shards.{os.getppid()}.ab"  # another process may be writing this one
    for name in (f"last.ckpt.shards.{os.getpid()}.ab", f"last.ckpt.shards.{1 << 30}.ab", alive):
        (copied / name).mkdir()
    remove_unfinished(copied)
    assert {each.name for each in copied.iterdir()} == kept | {alive}


def test_a_run_keeps_no_shards_of_checkpoints_that_it_has_replaced(folder, four):
    run_folder = folder / "four"
    named = {shards_of(path).name for path in run_folder.glob("*.ckpt")}
    assert {path.name for path in run_folder.glob("*.shards.*")} == named
    assert len(named) == len(list(run_folder.glob("*.ckpt")))
