"""Streams of tar shards: passes, ranks, workers, resuming, faults, and a run."""

import io
import tarfile

import numpy as np
import pytest
import torch
from grouped import grouped
from lightning import Trainer
from PIL import Image

from ant_lightning import (
    DDIM,
    CosineSchedule,
    DiT,
    DiTModule,
    StreamData,
    TarShards,
    TimestepClustering,
)
from ant_lightning.data.archives.stream import _Batches
from ant_lightning.errors import ConfigError, DataLoadingError

pytest.importorskip("webdataset")
SHARDS, EACH = 4, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards in which image i has the grey value i and the label i % 3."""
    root = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for i in range(shard * EACH, (shard + 1) * EACH):
                file = io.BytesIO()
                Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(file, "PNG")
                for suffix, content in (("png", file.getvalue()), ("cls", str(i % 3).encode())):
                    member = tarfile.TarInfo(f"{i:04}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return root


def stream(folder, **settings):
    defaults = {"num_images": 24, "batch_size": 4, "buffer": 5, "num_workers": 0, "seed": 0}
    settings = defaults | settings
    held_out = TarShards(str(folder / "0.tar"))
    return StreamData(f"{folder}/{{0..3}}.tar", held_out=held_out, **settings)


def values(batch):
    return ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (4, 0), (2, 2)])
def test_a_pass_has_every_shard_once_whatever_ranks_and_workers(folder, world_size, workers):
    size = 2 * world_size  # batches of two for each rank, which shards have whole
    data, seen = stream(folder, batch_size=size, buffer=1), []
    per_rank = SHARDS * EACH // world_size // 2
    for rank in range(world_size):
        batches = _Batches(data, (rank, world_size), first=0)
        loader = iter(torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers))
        seen += [value for _ in range(per_rank) for value in values(next(loader))]
        if workers:
            loader._shutdown_workers()
    assert sorted(seen) == list(range(SHARDS * EACH))


def test_a_buffer_mixes_the_images_of_shards(folder):
    loader = stream(folder, buffer=12).train_dataloader()
    seen = [value for batch in loader for value in values(batch)]
    assert seen != sorted(seen)
    shards = [value // EACH for value in seen]
    assert sum(map(int.__ne__, shards, shards[1:])) > SHARDS - 1  # more changes than shards


def test_labels_belong_to_images_and_a_run_repeats(folder):
    runs = [iter(stream(folder).train_dataloader()) for _ in range(2)]
    for _ in range(6):
        first, second = (next(each) for each in runs)
        assert first.labels.tolist() == [each % 3 for each in values(first)]
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.indices, second.indices)
    assert not torch.equal(
        next(iter(stream(folder, seed=1).train_dataloader())).images,
        next(iter(stream(folder).train_dataloader())).images,
    )


def test_a_resumed_stream_keeps_the_count_and_begins_a_new_pass(folder):
    loader = stream(folder).train_dataloader()
    assert len(loader) == 6
    first = [values(batch) for batch in loader]
    again = stream(folder).train_dataloader()
    again.load_state_dict({**loader.state_dict(), "position": 3})
    resumed = [values(batch) for batch in again]
    assert again.state_dict()["position"] == 9
    assert resumed[:3] != first[3:]


def test_a_run_on_a_stream(folder, tmp_path):
    torch.manual_seed(0)
    network = DiT(input_size=8, patch_size=4, in_channels=3, hidden_size=8, depth=1, num_heads=1,
                  num_classes=3)  # fmt: skip
    settings = grouped(
        schedule=CosineSchedule(100),
        variance_type="learned_range",
        clustering=TimestepClustering(num_tasks=2),
        sampler=DDIM(num_steps=2),
    )
    module = DiTModule(network, **settings)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=8, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, datamodule=stream(folder))
    assert trainer.global_step == 8
    assert "val/loss" in trainer.callback_metrics


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="num_workers: the 8 loading processes of all ranks must"):
        stream(folder, num_workers=8).train_dataloader()
    with pytest.raises(ConfigError, match="with_train: false"):
        stream(folder).train_images.pixels([0])
    data = stream(folder)
    data.shards = [str(tmp_path / "none.tar")]
    with pytest.raises(DataLoadingError, match="shards: must be readable tar files, found File"):
        next(iter(data.train_dataloader()))
    data = stream(folder, num_classes=3)
    data.num_classes = 2
    with pytest.raises(DataLoadingError, match=r"\d+ must have a label from 0 to 1, found 2"):
        list(data.train_dataloader())
