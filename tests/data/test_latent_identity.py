"""A latent cache says which images it was made of: others are refused by name."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from first_stages import save_first_stages
from PIL import Image

from ant_lightning import (
    ConfigError,
    FirstStage,
    ImageDataModule,
    ImageFolderData,
    LatentsData,
    LatentWriter,
    ShapesData,
)
from ant_lightning.cli.main import main
from ant_lightning.data.dataset import TensorImages


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return FirstStage(str(save_first_stages(tmp_path_factory.mktemp("first_stages")) / "kl"))


def fill(root, seed=0):
    """8 files whose sizes are equal whatever the pixels."""
    for i in range(8):
        folder = root / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shape = (8, 16, 3)
        pixels = np.random.default_rng((seed, i)).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.bmp")
        os.utime(folder / f"{i}.bmp", (0, 0))  # as from an archive


@pytest.fixture
def root(tmp_path):
    fill(tmp_path / "images")
    return tmp_path / "images"


def images(root, **options):
    defaults = {"image_size": 8, "batch_size": 2, "num_held_out": 3, "num_workers": 0}
    return ImageFolderData(str(root), **{**defaults, **options})


def encode(root, cache, stage, flip=True, **options):
    return LatentWriter(str(cache), shard_size=2, flip=flip).write(images(root, **options), stage)


def contents(cache):
    return {path.name: path.read_bytes() for path in cache.iterdir()}


@pytest.fixture
def cache(root, stage, tmp_path):
    encode(root, tmp_path / "cache", stage)
    return tmp_path / "cache"


def replace_one(root):
    path = root / "a" / "0.bmp"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_all(root):
    shutil.rmtree(root)
    fill(root, seed=1)


def rename_one(root):
    (root / "a" / "0.bmp").rename(root / "a" / "00.bmp")


def rename_class(root):
    (root / "b").rename(root / "c")


def move_to_another_class(root):
    (root / "a" / "6.bmp").rename(root / "b" / "0.bmp")


CHANGED_FILES = {
    replace_one: "digest of the images",
    replace_all: "digest of the images",
    rename_one: "digest of the images",
    rename_class: "class_names",
    move_to_another_class: "digest of the images",
}
CHANGED_SETTINGS = {
    "crop": "resize",
    "split_seed": 5,
    "exif_rotation": False,
    "labels": "none",
}


@pytest.mark.parametrize("change", CHANGED_FILES)
def test_other_images_are_refused_by_encode_and_as_images_of_the_cache(cache, root, stage, change):
    before = contents(cache)
    change(root)
    with pytest.raises(ConfigError, match=rf"^output: .* images\.{CHANGED_FILES[change]} "):
        encode(root, cache, stage)
    assert contents(cache) == before
    with pytest.raises(ConfigError, match=rf"^images: .* {CHANGED_FILES[change]} "):
        LatentsData(str(cache), batch_size=2, images=images(root)).setup("fit")


@pytest.mark.parametrize("name", CHANGED_SETTINGS)
def test_other_settings_are_refused_by_encode_and_as_images_of_the_cache(cache, root, stage, name):
    before, changed = contents(cache), {name: CHANGED_SETTINGS[name]}
    # Without labels there are no classes, which is what the message names.
    words = "num_classes" if name == "labels" else rf"{name} .* {changed[name]}"
    words = words.replace("False", "false")
    with pytest.raises(ConfigError, match=rf"^output: .* (images\.)?{words}"):
        encode(root, cache, stage, **changed)
    assert contents(cache) == before
    with pytest.raises(ConfigError, match=rf"^images: .* {words}"):
        LatentsData(str(cache), batch_size=2, images=images(root, **changed)).setup("fit")


def test_the_settings_in_the_index_are_refused_by_name(cache, root, stage):
    for changed, name in (
        ({"image_size": 16}, "image_shape"),
        ({"num_held_out": 2}, "num_images"),
        ({"flip": False}, "views"),
    ):
        with pytest.raises(ConfigError, match=rf"^output: .* {name} "):
            encode(root, cache, stage, **changed)


def test_training_images_are_never_among_the_held_out_of_the_cache(cache, root):
    other = images(root, split_seed=5)
    ours = images(root)
    trained_on = {path.name for path in other.train_images.paths}
    assert trained_on & {path.name for path in ours.held_out_images.paths}
    LatentsData(str(cache), batch_size=2, images=ours).setup("fit")
    with pytest.raises(ConfigError, match=r"split_seed 0, found 5"):
        LatentsData(str(cache), batch_size=2, images=other).setup("fit")


def test_an_interrupted_encode_goes_on_with_a_copy_of_the_images(cache, root, stage, tmp_path):
    whole = contents(cache)
    (cache / "train_00001.safetensors").unlink()
    shutil.copytree(root, tmp_path / "scratch")
    for path in (tmp_path / "scratch").rglob("*.bmp"):
        os.utime(path)
    assert encode(tmp_path / "scratch", cache, stage) == 1
    assert contents(cache) == whole
    LatentsData(str(cache), batch_size=2, images=images(tmp_path / "scratch")).setup("fit")


def test_bytes_are_not_read_again_while_names_sizes_and_times_are_the_same(root):
    known = images(root).identity()
    marked = {**known, "digest of the images": "as it was"}
    assert images(root).identity(marked) == marked
    path = root / "b" / "1.bmp"
    os.utime(path, ns=(1, 1))
    assert images(root).identity(known) == known
    assert images(root).identity(marked)["digest of the images"] == known["digest of the images"]


def test_a_cache_of_0_1_is_refused(cache, root, stage):
    content = json.loads((cache / "index.json").read_text())
    (cache / "index.json").write_text(json.dumps({**content, "format_version": 1}))
    before = contents(cache)
    for act in (lambda: LatentsData(str(cache), batch_size=2), lambda: encode(root, cache, stage)):
        with pytest.raises(ConfigError, match=r"index\.json: .* must be 2, found 1; encode"):
            act()
    assert contents(cache) == before


def test_shards_without_an_index_are_not_trusted(cache, root, stage):
    whole = contents(cache)
    (cache / "index.json").unlink()
    assert encode(root, cache, stage) == 5
    assert contents(cache) == whole


def test_drawn_images_are_told_by_their_settings(stage, tmp_path):
    def shapes(**options):
        defaults = {"image_size": 8, "num_images": 5, "num_held_out": 2, "batch_size": 2}
        return ShapesData(**{**defaults, **options})

    writer = LatentWriter(str(tmp_path / "cache"))
    assert writer.write(shapes(), stage) == 2
    assert writer.write(shapes(batch_size=1), stage) == 0
    with pytest.raises(ConfigError, match="shapes_seed 0, and this run has 1"):
        writer.write(shapes(shapes_seed=1), stage)


class Own(ImageDataModule):
    """A module of a user's, which says nothing of its images."""

    image_shape = (3, 8, 8)
    num_classes = 2

    def __init__(self, pixels, labels):
        super().__init__(batch_size=1, num_workers=0, seed=0)
        self.parts = [TensorImages(pixels[:3], labels[:3]), TensorImages(pixels[3:], labels[3:])]

    def prepare(self):
        return tuple(self.parts)


def test_images_of_any_other_module_are_told_by_pixels_and_labels(stage, tmp_path):
    pixels, labels = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 0, 1, 0])
    writer = LatentWriter(str(tmp_path / "cache"))
    assert writer.write(Own(pixels, labels), stage) == 2
    assert writer.write(Own(pixels.clone(), labels), stage) == 0
    other = pixels.clone()
    other[4, 2, 7, 7] -= 0.5
    for data in (Own(other, labels), Own(pixels, 1 - labels), Own(pixels.flip(0), labels)):
        with pytest.raises(ConfigError, match="digest of the images"):
            writer.write(data, stage)


def test_a_run_resumed_on_another_cache_says_so(cache, root, stage, tmp_path):
    encode(root, tmp_path / "other", stage, split_seed=5)
    state = LatentsData(str(cache), batch_size=2).state_dict()
    assert "times" not in json.dumps(state)
    with pytest.warns(UserWarning, match=r"images\.split_seed: .* has 0, this run 5"):
        LatentsData(str(tmp_path / "other"), batch_size=2).load_state_dict(state)


def test_the_command_refuses_another_crop_in_one_line(cache, root, stage, capsys):
    def command(*options):
        return main(
            [
                "encode",
                "--data=ImageFolderData",
                f"--data.root={root}",
                "--data.image_size=8",
                "--data.num_held_out=3",
                "--data.batch_size=2",
                "--data.num_workers=0",
                f"--first_stage.source={stage.space.source}",
                f"--cache.output={cache}",
                "--cache.shard_size=2",
                "--device=cpu",
                *options,
            ]
        )

    assert command() == 0
    assert "wrote 0 shards" in capsys.readouterr().out
    assert command("--data.crop=resize") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "crop center_adm, and this run has resize" in line
