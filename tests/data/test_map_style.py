"""Any map-style data set: samples of all kinds, ranks, workers, resuming, and what is refused."""

import hashlib
import pickle
import random

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10

from ant_lightning import HuggingFaceDataset, ImageDataModule, MapStyleData
from ant_lightning.cli.configs import config_names
from ant_lightning.cli.derived_settings import derived_settings
from ant_lightning.data.loader import ShuffledLoader
from ant_lightning.errors import ConfigError

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)


class Listed(Dataset):
    """Samples from a list, each changed by `change`."""

    def __init__(self, samples, change=lambda sample: sample, classes=None):
        self.samples, self.change, self.classes = samples, change, classes

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.change(self.samples[index])


def made(samples, *, change=lambda sample: sample, classes=None, **settings):
    settings = {"batch_size": 4, "num_workers": 0, "seed": 0, **settings}
    return MapStyleData(Listed(samples, change, classes), **settings)


KINDS = {
    "pair with a PIL image": lambda x, y: (Image.fromarray(x), y),
    "array [h, w, c] in a dict": lambda x, y: {"img": x, "label": np.int64(y)},
    "array [c, h, w]": lambda x, y: [np.moveaxis(x, -1, 0), torch.tensor(y)],
    "tensor": lambda x, y: (torch.from_numpy(x).permute(2, 0, 1), y, "more"),
    "tensor [h, w, c]": lambda x, y: (torch.from_numpy(x), y),
    "floats [h, w, c]": lambda x, y: (torch.from_numpy(x) / 255, y),
    "floats": lambda x, y: {"pixel_values": torch.from_numpy(x).movedim(-1, 0) / 255, "class": y},
}


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_every_kind_give_the_same_batch(kind):
    data = made([KINDS[kind](x, i % 3) for i, x in enumerate(PIXELS)], num_classes=3)
    assert data.shape_and_classes() == ((3, 8, 8), 3)
    batch = data.held_out_images.load([0, 1], epoch=None)
    places = data.held_out_images.positions
    expected = torch.from_numpy(PIXELS)[places].permute(0, 3, 1, 2).double() / 127.5 - 1
    assert torch.allclose(batch.images.double(), expected, atol=1e-6, rtol=0)
    assert batch.labels.tolist() == (places % 3).tolist()


def test_channels_of_other_numbers_and_transparency():
    images = [torch.rand(5, 8, 8)] * 4
    assert made(images, channels=5).image_shape == (5, 8, 8)
    assert made([np.zeros((4, 8, 8), np.float32)] * 4).image_shape == (4, 8, 8)
    clear = torch.zeros(4, 8, 8, dtype=torch.uint8)  # transparent black: white on white
    batch = made([clear] * 4).held_out_images.load([0], epoch=None)
    assert batch.images.unique().tolist() == [1.0]
    assert batch.images.shape == (1, 3, 8, 8)


def noisy(sample):
    """A transform that draws from all three global generators."""
    shift = random.randrange(8) + int(np.random.randint(8)) + int(torch.randint(8, ()))
    return np.roll(sample, shift, axis=1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_sample_once_an_epoch_and_the_same_for_ranks_and_workers(world_size):
    images = made(list(PIXELS), change=noisy, num_classes=0, num_held_out=4).train_images
    whole = list(ShuffledLoader(images, batch_size=4, seed=1))
    seen = torch.cat([batch.indices for batch in whole])
    assert sorted(seen.tolist()) == list(range(20))
    for workers in (0, 2, 4) if world_size == 2 else (0,):
        for rank in range(world_size):
            settings = {"rank": rank, "world_size": world_size, "num_workers": workers}
            loader = ShuffledLoader(images, batch_size=4, seed=1, **settings)
            for mine, batch in zip(loader, whole, strict=True):
                part = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
                assert torch.equal(mine.images, batch.images[part])
                assert torch.equal(mine.indices, batch.indices[part])
            if workers:
                loader._iterator._shutdown_workers()  # or the garbage collector waits for them


def test_a_resumed_loader_goes_on_bit_for_bit_and_leaves_the_generators_alone():
    data = made(list(PIXELS), change=noisy, num_classes=0)
    first = data.train_dataloader()
    before = torch.get_rng_state(), random.getstate()
    data.train_images.load([0, 1], epoch=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    batches = [batch for _ in range(2) for batch in first]
    second = made(list(PIXELS), change=noisy, num_classes=0).train_dataloader()
    second.load_state_dict({**first.state_dict(), "position": 3})
    rest = list(second)
    assert len(rest) == len(second) == 5
    for found, expected in zip(rest, batches[3:], strict=False):
        assert torch.equal(found.images, expected.images)


def test_torchvisions_files_by_class_path(tmp_path):
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rows = np.random.default_rng(1).integers(0, 256, (6, 3072), dtype=np.uint8)
    names = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
    for name in names:
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [0, 1, 2, 3, 4, 9]}))
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(meta)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    with pytest.MonkeyPatch.context() as patch:  # checksums of these files
        digest = {n: hashlib.md5((folder / n).read_bytes()).hexdigest() for n in names}
        for part in ("train_list", "test_list"):
            patch.setattr(CIFAR10, part, [[n, digest[n]] for n, _ in getattr(CIFAR10, part)])
        patch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()})
        parts = {
            name: {
                "class_path": "torchvision.datasets.CIFAR10",
                "init_args": {"root": str(tmp_path), "train": name == "dataset"},
            }
            for name in ("dataset", "held_out")
        }
        chosen = {"class_path": "ant_lightning.MapStyleData"}
        chosen["init_args"] = {**parts, "batch_size": 4, "num_workers": 0}
        data = parser.instantiate(parser.parse_object({"data": chosen})).data
        roots = [f"--data.{part}.root={tmp_path}" for part in parts]
        sizes = derived_settings(["--config", str(config_names()["cifar10/dit"]), *roots])
    assert {each.rpartition(".")[2] for each in sizes} == {
        *("input_size=32", "in_channels=3", "num_classes=10", "num_tasks=5", "num_timesteps=1000"),
    }
    assert data.shape_and_classes() == ((3, 32, 32), 10)
    assert (len(data.train_images), len(data.held_out_images)) == (30, 6)
    batch = data.held_out_images.load([5], epoch=None)
    pixels = torch.from_numpy(rows[5].reshape(1, 3, 32, 32))
    assert torch.equal(data.held_out_images.pixels([5]), pixels)
    assert batch.labels.tolist() == [9]


def test_local_data_of_hugging_face(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for i in range(6):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[i]).save(folder / f"{i}.png")
    folder = HuggingFaceDataset("imagefolder", data_dir=str(tmp_path / "images"))
    table = str(tmp_path / "table.parquet")
    folder._rows.to_parquet(table)
    parquet = HuggingFaceDataset("parquet", data_files=table)
    found = [MapStyleData(d, batch_size=2, num_workers=0) for d in (folder, parquet)]
    assert [each.shape_and_classes() for each in found] == [((3, 8, 8), 2)] * 2
    batches = [each.train_images.load(list(range(5)), epoch=None) for each in found]
    assert torch.equal(batches[0].images, batches[1].images)
    assert torch.equal(batches[0].labels, batches[1].labels)
    assert folder.fingerprint != parquet.fingerprint
    raw = MapStyleData(folder._rows, batch_size=2, num_workers=0)  # its features have the classes
    assert (raw.num_classes, raw.class_names) == (2, ["a", "b"])


WRONG = {
    "floats out of range": (
        lambda: made([torch.full((1, 8, 8), -1.0)] * 4),
        "value_range: floating-point images must lie in [0.0, 1.0], found values from -1.0",
    ),
    "no classes": (
        lambda: made([(x, 0) for x in PIXELS]),
        "num_classes: must be given",
    ),
    "no image": (lambda: made([{"x": 1}]), "image: must name the entry with the"),
    "a text": (lambda: made(["x"]), "image: must be a PIL image, an array"),
    "no channels": (
        lambda: made([torch.zeros(16, 16, 5)]),
        "image: must have 1, 3 or 4 channels as its first or its last dimension",
    ),
    "many channels of bytes": (
        lambda: made([torch.zeros(5, 16, 16, dtype=torch.uint8)], channels=5),
        "image: uint8 must have 1, 3 or 4 channels, found 5",
    ),
    "pictures in four channels": (
        lambda: made([Image.fromarray(PIXELS[0])], channels=4),
        "channels: must be 1 or 3 for pictures and uint8 images, found 4",
    ),
    "a label that is no number": (
        lambda: made([(x, "cat") for x in PIXELS]),
        "label: must be a whole number, found 'cat'",
    ),
    "another size": (
        lambda: (
            made([PIXELS[0], np.zeros((9, 9, 3), np.uint8)]).train_images.load([0], epoch=None)
            and made([PIXELS[0], np.zeros((9, 9, 3), np.uint8)]).held_out_images.load(
                [0], epoch=None
            )
        ),
        "image_size: must be given where images differ, found",
    ),
    "a label out of range": (
        lambda: made([(x, 7) for x in PIXELS], num_classes=3).train_images.load([0], epoch=None),
        "num_classes: labels must be from 0 to 2, found 7 in sample",
    ),
    "empty": (lambda: made([]), "dataset: must be a data set with a length above 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name):
    do, said = WRONG[name]
    with pytest.raises(ConfigError) as error:
        do()
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        ([("tench", "Tinca tinca"), ("goldfish",)], ["tench, Tinca tinca", "goldfish"]),
        (["cat", "dog", "cow"], []),  # of another number of classes
        (["cat", "cat"], []),
        (None, []),
    ],
)
def test_names_of_classes_are_those_of_the_data_set(classes, names):
    samples = [(image, i % 2) for i, image in enumerate(PIXELS)]
    assert made(samples, classes=classes, num_classes=2).class_names == names
