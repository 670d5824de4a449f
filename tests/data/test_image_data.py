"""A user's folder of images, and drawn shapes: what is found, decoded, refused."""

import json
import re
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from ant_lightning import ConfigError, ImageFolderData, ShapesData
from ant_lightning.data.pictures import read_picture
from ant_lightning.errors import FileError


def save(path, size=(16, 16), seed=0, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path, **options)
    return pixels


@pytest.fixture
def nested(tmp_path):
    for number in range(9):
        save(tmp_path / ["cat", "ant", "bee"][number % 3] / f"{number}.png", seed=number)
    (tmp_path / "ant" / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def folder_data(root, **options):
    defaults = {"image_size": 16, "batch_size": 2, "num_held_out": 2, "num_workers": 0}
    return ImageFolderData(str(root), **{**defaults, **options})


def test_nested_folders_are_classes_in_sorted_order(nested):
    data = folder_data(nested)
    data.setup("validate")
    assert data.class_names == ["ant", "bee", "cat"]
    assert data.num_classes == 3
    train, held_out = data.train_images, data.held_out_images
    assert (len(train), len(held_out)) == (7, 2)
    assert not set(train.paths) & set(held_out.paths)
    for part in (train, held_out):
        batch = part.load(list(range(len(part))), epoch=None)
        names = [data.class_names[label] for label in batch.labels.tolist()]
        assert names == [path.parent.name for path in part.paths]
    pixels = np.asarray(Image.open(train.paths[3])).astype(np.float64)
    image = train.load([3], epoch=None).images[0].permute(1, 2, 0)
    np.testing.assert_allclose(image, pixels / 127.5 - 1, atol=1e-6)


def test_flat_folders_have_no_classes_and_so_have_nested_ones_on_demand(nested, tmp_path):
    flat = folder_data(nested / "ant", num_held_out=1)
    flat.setup("validate")
    assert (flat.num_classes, len(flat.train_images)) == (0, 2)
    unlabelled = folder_data(nested, labels="none")
    unlabelled.setup("validate")
    assert (unlabelled.num_classes, len(unlabelled.train_images)) == (0, 7)
    save(nested / "loose.png")
    for labels in ("auto", "folders"):
        with pytest.raises(ConfigError, match=r"labels.*loose\.png"):
            folder_data(nested, labels=labels).setup("fit")


def test_folders_without_images_and_other_paths_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^root: must hold images.*none in"):
        folder_data(tmp_path).setup("fit")
    with pytest.raises(ConfigError, match=r"^root: must be a folder.*nowhere"):
        folder_data(tmp_path / "nowhere").setup("fit")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_held_out": 9}, ["num_held_out", "9"]),
        ({"num_held_out": 0}, ["num_held_out", "0"]),
        ({"image_size": 0}, ["image_size", "0"]),
        ({"channels": 4}, ["channels", "4"]),
    ],
)
def test_bad_settings_name_the_setting_and_the_value(nested, options, words):
    with pytest.raises(ConfigError) as error:
        folder_data(nested, **options).setup("fit")
    assert all(word in str(error.value) for word in words)


def test_adm_crop_halves_with_a_box_and_cuts_the_middle(tmp_path):
    pixels = save(tmp_path / "a.png", size=(64, 32))
    found = read_picture(tmp_path / "a.png", image_size=16, channels=3, crop="center_adm")
    boxes = pixels.reshape(16, 2, 32, 2, 3).mean((1, 3))
    np.testing.assert_allclose(found, boxes[:, 8:24], atol=1.01)  # Pillow rounds twice


def test_adm_crop_scales_the_rest_bicubically_and_enlarges(tmp_path):
    pixels = save(tmp_path / "a.png", size=(30, 20))
    found = read_picture(tmp_path / "a.png", image_size=16, channels=3, crop="center_adm")
    whole = np.asarray(Image.fromarray(pixels).resize((24, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(found, whole[:, 4:20])
    assert read_picture(tmp_path / "a.png", image_size=40, channels=1, crop="resize").shape == (
        40,
        40,
        1,
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_breaks_after_the_check_is_named_and_those_before_it_come(
    nested, num_workers
):
    data = folder_data(nested, num_workers=num_workers, seed=0)
    data.setup("fit")
    order = [i for batch in data.train_dataloader() for i in batch.indices.tolist()]
    path = data.train_images.paths[order[-1]]
    path.write_bytes(path.read_bytes()[:200])
    batches = iter(data.train_dataloader())
    first = next(batches)
    assert first.indices.tolist() == order[:2]
    with pytest.raises(FileError, match=re.escape(f"{path}: cannot be decoded")):
        list(batches)


def test_a_file_whose_offset_is_a_fraction_is_damaged(tmp_path):
    save(tmp_path / "a.tiff", size=(4, 4))
    content = bytearray((tmp_path / "a.tiff").read_bytes())
    tag = content.index(struct.pack("<HH", 273, 4))  # where the strips begin, a 32-bit integer
    content[tag + 2] = 5  # of two of them
    (tmp_path / "a.tiff").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.tiff.*cannot be decoded"):
        read_picture(tmp_path / "a.tiff", image_size=4, channels=3, crop="center_adm")


def test_grey_alpha_palette_and_16_bit_files_become_8_bit_colour(tmp_path):
    def read(path, channels=3):
        return read_picture(path, image_size=4, channels=channels, crop="center_adm")

    grey = save(tmp_path / "grey.png", size=(4, 4), mode="L")
    np.testing.assert_array_equal(read(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(read(tmp_path / "grey.png", 1)[..., 0], grey)
    rgba = save(tmp_path / "alpha.png", size=(4, 4), mode="RGBA").astype(float)
    share = rgba[..., 3:] / 255
    on_white = rgba[..., :3] * share + 255 * (1 - share)
    np.testing.assert_allclose(read(tmp_path / "alpha.png"), on_white, atol=1.01)
    palette = Image.fromarray(grey % 4, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.png", transparency=0)
    table = np.array([[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    np.testing.assert_array_equal(read(tmp_path / "palette.png"), table[grey % 4])
    deep = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4369
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read(tmp_path / "deep.png", 1)[..., 0], deep // 257)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ConfigError, match=r"float\.tiff.*floats"):
        read(tmp_path / "float.tiff")


def test_flips_are_coins_of_seed_epoch_and_index(nested):
    data = folder_data(nested)
    data.setup("validate")
    rows = list(range(7))
    plain = data.train_images.load(rows, epoch=None).images
    flipped = []
    for epoch in range(20):
        images = data.train_images.load(rows, epoch=epoch).images
        mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(images, plain, strict=True)]
        same = [torch.equal(a, b) for a, b in zip(images, plain, strict=True)]
        assert mirrored == [not each for each in same]
        flipped.append(mirrored)
    assert 45 <= sum(map(sum, flipped)) <= 95  # of 140: mean 70, 4 standard deviations
    again = data.train_images.load([5, 1], epoch=3).images
    torch.testing.assert_close(again, data.train_images.load(rows, epoch=3).images[[5, 1]])
    held_out = data.held_out_images
    assert torch.equal(held_out.load([0], epoch=1).images, held_out.load([0], epoch=None).images)


@pytest.fixture
def with_broken(nested):
    whole = (nested / "bee" / "2.png").read_bytes()
    (nested / "bee" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (nested / "cat" / "text.jpg").write_text("this is not a picture")
    return nested


def test_broken_images_are_named_before_training(with_broken):
    with pytest.raises(ConfigError) as error:
        folder_data(with_broken).setup("fit")
    for word in ("validate_images", "2 broken", "bee/cut.png", "cat/text.jpg", "skip"):
        assert word in str(error.value)


def test_broken_images_are_skipped_and_counted_on_demand(with_broken):
    data = folder_data(with_broken, validate_images="skip")
    with pytest.warns(UserWarning, match=r"left out 2 broken.*cut\.png"):
        data.setup("validate")
    assert data.num_skipped == 2
    assert len(data.train_images) + len(data.held_out_images) == 9


def test_a_large_folder_is_not_decoded_first(nested, monkeypatch):
    from ant_lightning.data import image_folder

    checked = []
    monkeypatch.setattr(image_folder, "broken_images", lambda paths: checked.append(paths) or {})
    for many, count in ((9, 9), (8, 3)):
        monkeypatch.setattr(image_folder, "_MANY_IMAGES", many)
        monkeypatch.setattr(image_folder, "_SPOT_CHECKS", 3)
        folder_data(nested).setup("fit")
        assert len(checked[-1]) == count
    folder_data(nested, validate_images="raise").setup("fit")
    assert len(checked[-1]) == 9
    folder_data(nested, validate_images="off").setup("fit")
    assert checked[-1] == []


def test_unchecked_broken_images_are_named_when_their_turn_comes(with_broken):
    data = folder_data(with_broken, validate_images="off", num_held_out=1)
    data.setup("validate")
    paths = [path.name for path in data.train_images.paths]
    with pytest.raises(ConfigError, match=r"bee/cut\.png.*truncated or damaged"):
        data.train_images.load([paths.index("cut.png")], epoch=0)


def test_the_class_map_is_written_read_and_keeps_numbers(nested):
    path = nested / "map.json"
    folder_data(nested, class_map=str(path)).setup("validate")
    assert json.loads(path.read_text()) == {"ant": 0, "bee": 1, "cat": 2}
    path.write_text(json.dumps({"cat": 0, "dog": 1, "bee": 2, "ant": 3}))
    data = folder_data(nested, class_map=str(path))
    data.setup("validate")
    assert data.class_names == ["cat", "dog", "bee", "ant"]
    assert data.num_classes == 4
    labels = data.train_images.labels.tolist()
    assert [data.class_names[i] for i in labels] == [
        path.parent.name for path in data.train_images.paths
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"../../etc": 0}', ["folder", "../../etc"]),
        ('{"a/b": 0}', ["folder", "a/b"]),
        ('{"..": 0}', ["folder", ".."]),
        ('{"a\\\\b": 0}', ["folder"]),
        ('{"ant": 0, "bee": 2}', ["0 .. 1", "[0, 2]"]),
        ('{"ant": 0, "bee": true}', ["0 .. 1"]),
        ("[1, 2]", ["object"]),
        ("{", ["JSON"]),
        ('{"ant": 0, "bee": 1}', ["no class 'cat'"]),
    ],
)
def test_bad_class_maps_are_refused(nested, content, words):
    path = nested / "map.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        folder_data(nested, class_map=str(path)).setup("fit")
    assert all(word in str(error.value) for word in ["map", *words]), str(error.value)


def test_a_checkpoint_of_other_classes_is_refused(nested):
    data = folder_data(nested)
    data.setup("validate")
    data.load_state_dict(data.state_dict())
    with pytest.raises(
        ConfigError, match=r'2 classes .*"ant", "dog".*found 3, .*"ant", "bee", "cat"'
    ):
        data.load_state_dict({"class_names": ["ant", "dog"]})


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), size=st.sampled_from([8, 32, 64]), classes=st.integers(1, 20))
def test_a_shape_is_a_function_of_seed_and_index(seed, size, classes):
    data = ShapesData(image_size=size, num_images=40, num_classes=classes, shapes_seed=seed)
    batch = data.train_images.load([7, 31], epoch=0)
    alone = data.train_images.load([31], epoch=5)
    # But for the last bits, which depend on the place in a batch on some CPUs.
    torch.testing.assert_close(batch.images[1], alone.images[0], rtol=0, atol=1e-5)
    assert batch.images.abs().max() <= 1
    assert batch.labels.tolist() == [7 % classes, 31 % classes]
    assert batch.images.flatten(1).std(1).min() > 0.03  # something is drawn
    behind = ShapesData(image_size=size, num_images=7, num_classes=classes, shapes_seed=seed)
    held_out = behind.held_out_images.load([0], epoch=None).images[0]
    torch.testing.assert_close(held_out, batch.images[0], rtol=0, atol=1e-5)


def test_shapes_are_the_same_picture_at_every_size():
    def images(size):
        return ShapesData(image_size=size).train_images.load(list(range(24)), epoch=None).images

    small, large = images(32), images(256)
    pooled = torch.nn.functional.avg_pool2d(large, 8)
    assert (small - pooled).abs().mean() < 0.02


def test_classes_beyond_six_are_other_hues():
    data = ShapesData(image_size=32, num_images=240, num_classes=12)
    batch = data.train_images.load(list(range(240)), epoch=None)
    brightest = batch.images.amax((2, 3))  # the background is dark
    hue_0, hue_1 = (brightest[batch.labels // 6 == hue].mean(0) for hue in range(2))
    assert hue_0[0] > hue_0[2]  # red to yellow and green
    assert hue_1[2] > hue_1[0]  # cyan to blue and violet


@pytest.mark.parametrize(
    "options", [{"image_size": 512}, {"num_images": 0}, {"num_held_out": 0}, {"num_classes": 0}]
)
def test_bad_shapes_name_the_setting_and_the_value(options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=rf"^{name}.*found {value}"):
        ShapesData(**options)
