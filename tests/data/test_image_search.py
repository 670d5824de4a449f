"""Folders as people have them: photos, links, other kinds of files, thumbnails of file servers."""

import os
import shutil

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image

from ant_lightning import ConfigError, ImageFolderData, StoredImages
from ant_lightning.cli.config_files import load_yaml
from ant_lightning.cli.main import _fail
from ant_lightning.data.class_map import read_class_map, write_class_map
from ant_lightning.data.pictures import SUFFIXES

LATIN = os.fsdecode(b"caf\xe9")  # not UTF-8


def pixels(seed, size=(6, 4)):
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def save(path, seed=0, size=(6, 4), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, size)).convert(mode).save(path, **options)


def fill(folder, count=4, first=0):
    for i in range(first, first + count):
        save(folder / f"{i}.png", i)


def folder_data(root, **options):
    defaults = {"image_size": 4, "batch_size": 1, "num_held_out": 1, "num_workers": 0}
    data = ImageFolderData(str(root), **{**defaults, "flip": False, **options})
    data.setup("validate")
    return data


def names(data):
    paths = [*data.train_images.paths, *data.held_out_images.paths]
    return sorted(str(path.relative_to(data.root)) for path in paths)


# The EXIF standard, as operations on the stored pixels.
SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("kind", ["png", "webp"])
def test_photos_are_turned_as_their_exif_data_say(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for i in range(2):
        save(tmp_path / f"{i}.{kind}", i, size=(4, 4), exif=exif, lossless=True)
    for exif_rotation in (True, False):
        data = folder_data(tmp_path, exif_rotation=exif_rotation)
        (image,) = data.held_out_images.load([0], epoch=None).images
        stored = pixels(int(data.held_out_images.paths[0].stem), (4, 4))
        wanted = SHOWN[orientation](stored) if exif_rotation else stored
        found = ((image + 1) * 127.5).round().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(found, wanted)


def test_a_photo_is_cropped_and_measured_after_it_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(2):
        save(tmp_path / f"{i}.png", i, size=(4, 8), exif=exif)
    shown = np.rot90(pixels(0, (4, 8)), -1)  # 8 wide, 4 high
    (batch,) = StoredImages(tmp_path).batches(limit=1)
    np.testing.assert_array_equal(batch[0].permute(1, 2, 0), shown)
    data = folder_data(tmp_path)
    images = torch.cat(
        [p.load([0], epoch=None).images for p in (data.train_images, data.held_out_images)]
    )
    order = [int(p.paths[0].stem) for p in (data.train_images, data.held_out_images)]
    found = ((images[order.index(0)] + 1) * 127.5).round().permute(1, 2, 0)
    np.testing.assert_array_equal(found, shown[:, 2:6])


def test_damaged_exif_data_turn_nothing(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}.png", i, size=(4, 4), exif=b"Exif\0\0MM\0nonsense")
    data = folder_data(tmp_path)
    (image,) = data.held_out_images.load([0], epoch=None).images
    stored = pixels(int(data.held_out_images.paths[0].stem), (4, 4))
    np.testing.assert_array_equal(((image + 1) * 127.5).round().permute(1, 2, 0), stored)


def test_what_was_computed_of_unturned_photos_is_not_used_for_turned_ones(tmp_path):
    fill(tmp_path)
    turned, stored = (folder_data(tmp_path, exif_rotation=on) for on in (True, False))
    assert turned.fingerprint(turned.train_images) != stored.fingerprint(stored.train_images)
    assert turned.identity()["exif_rotation"] != stored.identity()["exif_rotation"]


def link_to_itself(root, outside):
    (root / "a" / "again").symlink_to(".")


def link_to_a_parent(root, outside):
    (root / "a" / "up").symlink_to(root)


def link_above_the_root(root, outside):
    (root / "a" / "up").symlink_to(root.parent)


def link_beside(root, outside):
    (root / "z").symlink_to(root / "a")


def links_in_a_circle(root, outside):
    (root / "a" / "to_b").symlink_to(root / "b")
    (root / "b" / "to_a").symlink_to(root / "a")


def links_to_images(root, outside):
    (root / "b" / "copy.png").symlink_to(root / "a" / "0.png")
    (root / "b" / "copy2.png").symlink_to(root / "a" / "0.png")


LINKS = [
    link_to_itself,
    link_to_a_parent,
    link_above_the_root,
    link_beside,
    links_in_a_circle,
    links_to_images,
]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("labels", ["none", "folders"])
def test_each_image_counts_once_whatever_links_lead_to_it(tmp_path, link, labels):
    root, outside = tmp_path / "root", tmp_path / "outside"
    fill(root / "a", 3)
    fill(root / "b", 2)
    fill(outside, 2)
    link(root, outside)
    with pytest.warns(UserWarning, match=r"root: skipped links to what was found already"):
        data = folder_data(root, labels=labels)
    assert names(data) == ["a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png"]
    assert data.class_names == (["a", "b"] if labels == "folders" else [])


def test_links_to_other_places_are_followed_once(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    fill(root / "a", 2)
    fill(outside / "more", 2)
    (outside / "more" / "back").symlink_to(outside)
    save(tmp_path / "single.png", 9)
    (root / "b").symlink_to(outside)
    (root / "a" / "one.png").symlink_to(tmp_path / "single.png")
    with pytest.warns(UserWarning, match=r"already: 1, such as .*back"):
        data = folder_data(root)
    assert names(data) == ["a/0.png", "a/1.png", "a/one.png", "b/more/0.png", "b/more/1.png"]
    assert data.class_names == ["a", "b"]


def test_a_link_to_nothing_is_a_broken_image(tmp_path):
    fill(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"1 broken image: .*gone\.png"):
        folder_data(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_named_and_not_waited_for(tmp_path):
    fill(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.warns(UserWarning, match=r"pipe\.png"):
        assert len(names(folder_data(tmp_path))) == 4


# By the ending, the format that Pillow writes.
KINDS = {
    "gif": "GIF",
    "jfif": "JPEG",
    "jpe": "JPEG",
    "tga": "TGA",
    "dib": "DIB",
    "pbm": "PPM",
    "pnm": "PPM",
    "apng": "PNG",
    "avif": "AVIF",
    "jp2": "JPEG2000",
    "JPG": "JPEG",
}


@pytest.mark.parametrize("ending", [e for e in KINDS if f".{e.lower()}" in SUFFIXES or e == "gif"])
def test_other_kinds_of_images_are_read(tmp_path, ending):
    for i in range(2):
        image = Image.new("RGB", (8, 8), (200, 40, 40))
        image.save(tmp_path / f"{i}.{ending}", format=KINDS[ending])
    fill(tmp_path, 2, first=10)
    data = folder_data(tmp_path, num_held_out=3)
    parts = (data.train_images, data.held_out_images)
    images = [image for part in parts for image in part.load(list(range(len(part))), epoch=None)[0]]
    reds = [image for image in images if image.flatten(1).std(1).max() < 0.05]
    assert len(images) == 4
    assert len(reds) == 2
    if ending != "pbm":  # of black and white
        for image in reds:
            wanted = torch.tensor([200, 40, 40]) / 127.5 - 1
            torch.testing.assert_close(image.mean((1, 2)), wanted, rtol=0, atol=0.08)


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), (80 * i, 0, 0)) for i in range(3)]
    for i in range(2):
        frames[2].save(tmp_path / f"{i}.gif", save_all=True, append_images=frames[:2])
    image = folder_data(tmp_path).held_out_images.load([0], epoch=None).images[0]
    torch.testing.assert_close(image[0], torch.full((4, 4), 160 / 127.5 - 1), rtol=0, atol=0.03)


def test_text_is_no_image_whatever_its_name(tmp_path):
    fill(tmp_path)
    (tmp_path / "a.tga").write_text("not a picture")
    (tmp_path / "b.png").write_bytes(bytes(2000))
    with pytest.raises(ConfigError, match="2 broken images"):
        folder_data(tmp_path)


def test_files_of_kinds_that_are_not_read_are_counted_and_named(tmp_path):
    fill(tmp_path)
    for name in ("a.heic", "b.HEIC", "c.mp4", "d"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "captions.txt").write_text("0: a cat")
    with pytest.warns(UserWarning, match="skipped") as caught:
        folder_data(tmp_path)
    (message,) = {str(each.message) for each in caught}
    for word in ("not read: 4", ".heic 2", ".mp4 1", "no ending 1", "a.heic"):
        assert word in message


def empty(folder, other):
    folder.mkdir()


def of_other_kinds(folder, other):
    folder.mkdir()
    (folder / "1.heic").write_bytes(b"1")


def of_text(folder, other):
    folder.mkdir()
    (folder / "list.txt").write_text("1")


def of_thumbnails(folder, other):
    fill(folder / "@eaDir")


def of_links(folder, other):
    folder.mkdir()
    (folder / "0.png").symlink_to(other / "0.png")


@pytest.mark.parametrize(
    ("vanish", "why"),
    [
        (empty, "no picture files"),
        (of_other_kinds, r"not read: 1 \(\.heic 1\)"),
        (of_text, "no picture files"),
        (of_thumbnails, "no picture files"),
        (of_links, r"already: 1, such as .*0\.png"),
    ],
)
@pytest.mark.filterwarnings("ignore:root. skipped")
def test_a_class_that_would_vanish_is_an_error_that_names_it(tmp_path, vanish, why):
    fill(tmp_path / "cat")
    fill(tmp_path / "dog")
    vanish(tmp_path / "bird", tmp_path / "cat")
    with pytest.raises(ConfigError, match=rf"^root: .* found none in bird \(bird: .*{why}"):
        folder_data(tmp_path)
    assert len(names(folder_data(tmp_path, labels="none"))) == 8


def test_a_class_of_broken_images_alone_is_an_error(tmp_path):
    fill(tmp_path / "cat")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "0.png").write_bytes(b"no image")
    with (
        pytest.warns(UserWarning, match="left out 1 broken"),
        pytest.raises(ConfigError, match=r"^validate_images: .* found none of dog in"),
    ):
        folder_data(tmp_path, validate_images="skip")


def test_folders_without_any_image_say_what_is_there(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"1")
    with pytest.raises(ConfigError, match=r"found none in .*, but files .* not read: 1 \(\.heic"):
        folder_data(tmp_path)
    save(tmp_path / "only.png")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ConfigError, match=r"^num_held_out: .* below the 1 images in .*, found 1"),
    ):
        folder_data(tmp_path)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ConfigError, match=r"^root: must hold at least 2 images, one .*, found 1 in"),
    ):
        folder_data(tmp_path, num_held_out=None)


SYSTEM = ["@eaDir", "__MACOSX", ".thumbs", "#recycle", "$RECYCLE.BIN", "lost+found", "@Recycle"]


@pytest.mark.parametrize("name", SYSTEM)
def test_folders_of_systems_are_no_classes_and_not_searched(tmp_path, name):
    fill(tmp_path / "cat")
    fill(tmp_path / "dog")
    shutil.copytree(tmp_path / "cat", tmp_path / name / "thumb")
    shutil.copytree(tmp_path / "cat", tmp_path / "dog" / name)
    for litter in ("Thumbs.db", "desktop.ini", "._0.png", ".DS_Store"):
        (tmp_path / "cat" / litter).write_bytes(b"1")
    data = folder_data(tmp_path)
    assert data.class_names == ["cat", "dog"]
    assert len(names(data)) == 8


def test_names_that_are_not_utf8_work(tmp_path):
    root, state, class_map = (tmp_path / name for name in ("images", "state.pt", "map.json"))
    fill(root / LATIN)
    save(root / "b" / f"{LATIN}.png")
    data = folder_data(root)
    assert data.class_names == ["b", LATIN]
    for part in (data.train_images, data.held_out_images):
        assert len(data.fingerprint(part)) == 64
    torch.save(data.state_dict(), state)
    data.load_state_dict(torch.load(state, weights_only=True))
    write_class_map(class_map, data.class_names)
    assert read_class_map(class_map) == data.class_names
    assert folder_data(root, class_map=str(class_map)).identity() == data.identity()


def test_a_class_map_of_somebody_else_is_kept(tmp_path):
    root, path = tmp_path / "images", tmp_path / "class_map.json"
    fill(root / "ant")
    fill(root / "bee")
    data = folder_data(root)
    data.trainer = Trainer(logger=False, default_root_dir=tmp_path, accelerator="cpu")
    for _ in range(2):  # the second time it is there
        data.setup("fit")
        assert read_class_map(path) == ["ant", "bee"]
    for content in ('{"cat": 0, "dog": 1}', "notes of mine"):
        path.write_text(content)
        with pytest.warns(UserWarning, match=r"class_map\.json: has other classes and is not"):
            data.setup("fit")
        assert path.read_text() == content


def test_messages_about_names_that_are_not_utf8_can_be_shown(tmp_path, capsys):
    fill(tmp_path)
    (tmp_path / f"{LATIN}.png").write_bytes(b"no image")
    with pytest.raises(ConfigError) as error:
        folder_data(tmp_path)
    assert _fail(str(error.value), 2) == 2
    assert "caf\\udce9.png" in capsys.readouterr().err  # which takes UTF-8 alone
    with pytest.raises(ConfigError, match=r"UTF-8.* found 'caf\\udce9'.* link"):
        load_yaml(LATIN)


def test_one_grey_file_does_not_turn_the_others_grey(tmp_path):
    save(tmp_path / "0.png", mode="L")
    for i in (1, 2):
        save(tmp_path / f"{i}.png", i)
    images = torch.cat(list(StoredImages(tmp_path).batches(batch_size=2)))
    assert images.shape == (3, 3, 4, 6)
    np.testing.assert_array_equal(images[2].permute(1, 2, 0), pixels(2))
    assert torch.equal(images[0, 0], images[0, 2])
    for i in (1, 2):
        save(tmp_path / f"{i}.png", i, mode="L")
    (batch,) = StoredImages(tmp_path).batches(limit=1)
    assert batch.shape == (1, 1, 4, 6)


def test_stored_images_are_named_by_their_own_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"^images: must hold images"):
        StoredImages(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [{"crop": "resize"}, {"split_seed": 1}, {"num_held_out": 2}, {"exif_rotation": False}],
)
def test_a_checkpoint_of_other_images_is_said(tmp_path, changed):
    fill(tmp_path)
    state = folder_data(tmp_path).state_dict()
    ((name, value),) = changed.items()
    with pytest.warns(UserWarning, match=rf"{name}: the checkpoint has .*, this run {value}:"):
        folder_data(tmp_path, **changed).load_state_dict(state)
    folder_data(tmp_path).load_state_dict(state)


def test_a_checkpoint_of_0_1_loads_and_says_that_photos_are_turned_now(tmp_path):
    fill(tmp_path)
    state = {"class_names": []}
    with pytest.warns(UserWarning, match=r"exif_rotation: the checkpoint has False"):
        folder_data(tmp_path).load_state_dict(state)
    folder_data(tmp_path, exif_rotation=False).load_state_dict(state)
