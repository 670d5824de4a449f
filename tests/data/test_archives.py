"""Tar shards and zip archives: order over ranks and workers, resuming, indices, damage."""

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ant_lightning import EDMImages, MapStyleData, TarShards
from ant_lightning.data.archives.index import bytes_at
from ant_lightning.data.loader import ShuffledLoader
from ant_lightning.errors import ConfigError, FileError

PIXELS = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_shards(folder, counts=(10, 0, 9, 4)):
    """Shards of unequal lengths, one empty; sample i has the pixels i and the label i % 3."""
    start = 0
    for shard, count in enumerate(counts):
        files = {}
        for i in range(start, start + count):
            files[f"part/{i:06}.png"] = png(PIXELS[i])
            files[f"part/{i:06}.cls"] = f"{i % 3}\n".encode()
            files[f"part/{i:06}.json"] = json.dumps({"label": i % 2}).encode()
        start += count
        write_tar(folder / f"{shard:04}.tar", files)
    return f"{folder}/{{0000..{len(counts) - 1:04}}}.tar"


def write_zip(path, *, labels=True, method=zipfile.ZIP_STORED):
    names = [f"{i // 10:05}/img{i:08}.png" for i in range(len(PIXELS))]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, pixels in reversed(list(zip(names, PIXELS, strict=True))):
            archive.writestr(name, png(pixels))
        each = [[name, i % 3] for i, name in enumerate(names)] if labels else None
        archive.writestr("dataset.json", json.dumps({"labels": each}))


def made(dataset, **settings):
    settings = {"batch_size": 4, "num_workers": 0, "seed": 0, "num_held_out": 3, **settings}
    return MapStyleData(dataset, **settings)


KINDS = {
    "tar": lambda folder: TarShards(write_shards(folder)),
    "zip": lambda folder: (write_zip(folder / "a.zip"), EDMImages(f"{folder}/a.zip"))[1],
    "deflated zip": lambda folder: (
        write_zip(folder / "a.zip", method=zipfile.ZIP_DEFLATED),
        EDMImages(f"{folder}/a.zip"),
    )[1],
    "folder": lambda folder: (
        write_zip(folder / "a.zip"),
        zipfile.ZipFile(folder / "a.zip").extractall(folder / "a"),
        EDMImages(f"{folder}/a"),
    )[2],
}


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_their_pixels_and_labels(kind, tmp_path):
    dataset = KINDS[kind](tmp_path)
    assert (len(dataset), dataset.num_classes) == (23, 3)
    for i in range(len(dataset)):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(dataset[i]["image"]))), PIXELS[i])
        assert dataset[i]["label"] == i % 3
    data = made(dataset)
    assert data.shape_and_classes() == ((3, 8, 8), 3)
    places = data.train_images.positions
    expected = torch.from_numpy(PIXELS)[places[:2]].permute(0, 3, 1, 2)
    assert torch.equal(data.train_images.pixels([0, 1]), expected)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_sample_once_an_epoch_for_ranks_and_workers(kind, world_size, tmp_path):
    images = made(KINDS[kind](tmp_path)).train_images
    whole = list(ShuffledLoader(images, batch_size=4, seed=1))
    assert sorted(torch.cat([each.indices for each in whole]).tolist()) == list(range(20))
    for workers in (0, 2, 4) if world_size == 2 and kind == "tar" else (0,):
        for rank in range(world_size):
            settings = {"rank": rank, "world_size": world_size, "num_workers": workers}
            loader = ShuffledLoader(images, batch_size=4, seed=1, **settings)
            part = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
            for mine, batch in zip(loader, whole, strict=True):
                assert torch.equal(mine.images, batch.images[part])
                assert torch.equal(mine.indices, batch.indices[part])
            if workers:
                loader._iterator._shutdown_workers()  # or the garbage collector waits for them


def digest(batch):
    return hashlib.sha256(batch.images.numpy().tobytes()).hexdigest()


def endless(shards, log):
    """Note the digest of every batch, until the process is killed."""
    loader = made(TarShards(shards), num_workers=2).train_dataloader()
    while True:
        for batch in loader:
            with log.open("a") as file:
                print(loader.state_dict()["position"], digest(batch), file=file)
            time.sleep(0.02)


def noted(log):
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def test_a_killed_process_resumes_bit_for_bit(tmp_path):
    shards, log = write_shards(tmp_path), tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(target=endless, args=(shards, log))
    process.start()
    while len(noted(log)) < 7 and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    seen = noted(log)
    assert [int(position) for position, _ in seen] == list(range(1, len(seen) + 1))
    for start in (0, 3):  # from the beginning, and from the middle of an epoch
        loader = made(TarShards(shards)).train_dataloader()
        loader.load_state_dict({**loader.state_dict(), "position": start})
        batches = (batch for _ in range(len(seen)) for batch in loader)
        rest = [digest(next(batches)) for _ in seen[start:]]
        assert rest == [each for _, each in seen[start:]]


def test_an_index_is_made_once_and_anew_if_the_shard_changes(tmp_path, monkeypatch):
    write_shards(tmp_path)
    shard = tmp_path / "0000.tar"
    first = TarShards(str(shard))
    built = []
    keep = TarShards._built
    monkeypatch.setattr(TarShards, "_built", lambda self, s: built.append(s) or keep(self, s))
    again = TarShards(str(shard))
    assert built == []
    assert again.fingerprint == first.fingerprint
    assert [again[i] for i in range(10)] == [first[i] for i in range(10)]
    assert TarShards(str(shard), label="json:label").num_classes == 2
    assert built == [shard]  # another label is another index
    write_tar(shard, {"0.png": png(PIXELS[5]), "0.cls": b"7"})
    changed = TarShards(str(shard))
    assert (len(changed), changed.num_classes) == (1, 8)
    assert changed.fingerprint != first.fingerprint
    (tmp_path / ".0000.tar.index").write_bytes(b"damaged")
    assert len(TarShards(str(shard))) == 1


def test_an_index_goes_to_the_users_cache_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    from ant_lightning.data.archives import index

    write, written = index.write_tensors, []

    def only_in_cache(path, *arguments):
        if path.parent == tmp_path:
            raise PermissionError(path)
        written.append(path)
        write(path, *arguments)

    monkeypatch.setattr(index, "write_tensors", only_in_cache)
    pattern = write_shards(tmp_path, counts=(3,))
    assert [len(TarShards(pattern)) for _ in range(2)] == [3, 3]
    assert [path.parent for path in written] == [tmp_path / "cache" / "ant_lightning"]


def test_a_copy_has_the_same_identity_and_no_image_is_decoded_for_it(tmp_path, monkeypatch):
    write_zip(tmp_path / "a.zip")
    (tmp_path / "b.zip").write_bytes((tmp_path / "a.zip").read_bytes())
    data = [made(EDMImages(str(tmp_path / name))) for name in ("a.zip", "b.zip")]
    monkeypatch.setattr(EDMImages, "__getitem__", lambda self, index: pytest.fail("decoded"))
    assert data[0].identity() == data[1].identity()


def test_grey_images_and_no_labels(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{i}.png": png(PIXELS[i][..., 0]) for i in range(8)})
    assert made(TarShards(f"{tmp_path}/*.tar")).shape_and_classes() == ((1, 8, 8), 0)
    write_zip(tmp_path / "a.zip", labels=False)
    assert made(EDMImages(f"{tmp_path}/a.zip")).shape_and_classes() == ((3, 8, 8), 0)


IMAGE = png(PIXELS[0])
WRONG = {
    "compressed": (lambda path: tarfile.open(path, "w:gz").close(), {}, "uncompressed tar file"),
    "truncated": (
        lambda path: (write_tar(path, {"0.png": IMAGE * 9}), os.truncate(path, 1024)),
        {},
        "must be a whole",
    ),
    "no image": (lambda path: write_tar(path, {"0.cls": b"1"}), {}, "sample 0 must have one image"),
    "two images": (
        lambda path: write_tar(path, {"0.a.png": IMAGE, "0.b.png": IMAGE}),
        {},
        "found a.png, b.png; see `image`",
    ),
    "no such label": (
        lambda path: write_tar(path, {"0.png": IMAGE}),
        {"label": "cls"},
        "sample 0 must have a file .cls",
    ),
    "a word": (
        lambda path: write_tar(path, {"0.png": IMAGE, "0.cls": b"cat"}),
        {},
        "must have a whole number as label, found b'cat'",
    ),
    "some labels": (
        lambda path: write_tar(path, {"0.png": IMAGE, "0.cls": b"1", "1.png": IMAGE}),
        {},
        "label: every sample must have one or none",
    ),
    "twice": (
        lambda path: (
            write_tar(path, {"0.png": bytes(512)}),
            path.write_bytes(path.read_bytes()[:1024] * 2 + bytes(1024)),
        ),
        {},
        "occurs twice",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_shards_that_do_not_fit_are_refused(name, tmp_path):
    write, settings, said = WRONG[name]
    write(tmp_path / "a.tar")
    with pytest.raises(ConfigError) as error:
        TarShards(str(tmp_path / "a.tar"), **settings)
    assert said in str(error.value)


def test_one_image_of_two_is_chosen_by_name(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.a.png": IMAGE, "0.b.png": png(PIXELS[1])})
    assert TarShards(str(tmp_path / "a.tar"), image="b.png")[0] == {"image": png(PIXELS[1])}


def test_damage_in_a_zip_archive_is_found(tmp_path):
    write_zip(tmp_path / "a.zip")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    dataset = EDMImages(str(tmp_path / "a.zip"))
    place = content.index(png(PIXELS[4])) + 60
    content[place] ^= 1
    (tmp_path / "a.zip").write_bytes(content)
    assert dataset[3]["label"] == 0
    with pytest.raises(FileError, match="file 4 is damaged"):
        dataset[4]
    with pytest.raises(FileError, match="must have 10 bytes from"):
        bytes_at(tmp_path / "a.zip", len(content) - 5, 10)
    (tmp_path / "c.zip").write_bytes(b"no archive")
    with pytest.raises(FileError, match=r"c\.zip: must be a zip archive"):
        EDMImages(str(tmp_path / "c.zip"))


@pytest.mark.parametrize("labels", [[], [["00000/img00000000.png", "cat"]], 3])
def test_labels_of_a_zip_archive_must_be_there(labels, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("00000/img00000000.png", IMAGE)
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    with pytest.raises(FileError, match=r"dataset\.json"):
        EDMImages(str(tmp_path / "a.zip"))
