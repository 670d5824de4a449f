"""Images reach a folder or an npz file whole, once, and in the order of their indices."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_digits import T, TinyDiT, module, trainer

from ant_lightning import (
    DDIM,
    ConfigError,
    DigitsData,
    DiTModule,
    LatentSpace,
    LinearSchedule,
    SampleWriter,
    StoredImages,
)
from ant_lightning.callbacks.sample_files import NpzSamples, PngSamples
from ant_lightning.data.batch import to_uint8
from ant_lightning.data.class_map import class_numbers
from ant_lightning.errors import FileError


def pictures(channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (7, channels, 4, 5), generator=generator, dtype=torch.uint8)


def test_ranks_and_killed_runs_make_one_npz(tmp_path):
    path, images = tmp_path / "all.npz", pictures()
    first, second = (NpzSamples(path, 7) for _ in range(2))
    assert first.present() == set()
    first.write([4, 0], images[[4, 0]])
    second.write([5], images[[5]])
    unfinished = tmp_path / "all.npz.parts" / "000002.part"  # killed in the middle of an image
    unfinished.write_bytes((tmp_path / "all.npz.parts" / "000004.png").read_bytes()[:30])
    again = NpzSamples(path, 7)
    assert again.present() == {0, 4, 5}
    again.write([1, 2, 3, 6], images[[1, 2, 3, 6]])
    assert again.present() == set(range(7))
    again.finish()
    stored = np.load(path, allow_pickle=False)["arr_0"]
    assert stored.dtype == np.uint8
    assert np.array_equal(stored, images.permute(0, 2, 3, 1).numpy())
    assert torch.equal(torch.cat(list(StoredImages(path).batches(batch_size=3))), images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.npz"]
    assert NpzSamples(path, 7).present() == set(range(7))
    with pytest.raises(ConfigError, match=r"num_images: must be 7 as .*found 9"):
        NpzSamples(path, 9)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_hold_the_pixels(tmp_path, channels):
    files, images = PngSamples(tmp_path), pictures(channels)
    files.write([3, 12], images[:2])
    assert files.present() == {3, 12}
    stored = np.asarray(Image.open(tmp_path / "000012.png")).reshape(4, 5, channels)
    assert np.array_equal(stored, images[1].permute(1, 2, 0).numpy())


def predict(tmp_path, model, trainer_settings=(), **settings):
    writer = SampleWriter(**settings)
    run = trainer(tmp_path, writer, **dict(trainer_settings))
    run.predict(model, DigitsData(), return_predictions=False)
    return writer


def test_npz_png_batch_size_and_resuming_give_the_same_images(tmp_path, capsys):
    npz = tmp_path / "all.npz"
    predict(tmp_path, module(), num_images=6, batch_size=4, npz=str(npz))
    assert f"6 images are in {npz}" in capsys.readouterr().out
    whole = np.load(npz)["arr_0"]
    assert whole.shape == (6, 8, 8, 1)
    folder = tmp_path / "png"
    predict(tmp_path, module(), num_images=2, batch_size=1, folder=str(folder))
    kept = (folder / "000001.png").stat().st_mtime_ns
    predict(tmp_path, module(), num_images=6, batch_size=3, folder=str(folder))
    assert (folder / "000001.png").stat().st_mtime_ns == kept
    pngs = [np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))]
    assert np.array_equal(np.stack(pngs)[..., None], whole)
    note = json.loads((folder / "identity.json").read_text())
    assert note == json.loads(Path(f"{npz}.json").read_text())
    assert (note["seed"], note["guidance_scale"]) == (0, 1.0)
    assert note["sampler"]["num_steps"] == 2


def changed(change):
    """The network of the first images with one more change."""
    backbone = TinyDiT()
    with torch.no_grad():
        change(backbone)
    return module(backbone)


def last_bit(backbone):
    weight = backbone.blocks[0].mlp.fc1.weight
    assert weight.numel() > 128  # a digest of 64 numbers of it does not see the second
    weight.view(-1)[1:2].view(torch.int32).bitwise_xor_(1)


def heads(backbone):
    backbone.blocks[0].attn.num_heads = 2


class OtherModule(DiTModule):
    """May draw in a way of its own."""


# What decides an image -> a module that differs in nothing else.
OTHERS = {
    "weights": lambda: changed(last_bit),
    "network": lambda: changed(heads),
    "sampler": lambda: module(sampler=DDIM(num_steps=3)),
    "guidance_scale": lambda: module(guidance_scale=3.0),
    "guided_channels": lambda: module(guided_channels=1),
    "clip_denoised": lambda: module(clip_denoised=False),
    "seed": lambda: module(seed=1),
    "prediction_type": lambda: module(prediction_type="x0"),
    "schedule": lambda: module(schedule=LinearSchedule(T)),
    "model": lambda: module(kind=OtherModule),
}


def content(folder):
    """Every file, and when it was written."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [(p, p.read_bytes(), p.stat().st_mtime_ns) for p in files]


def place(kind, path):
    return {kind: str(path / ("all.npz" if kind == "npz" else "images"))}


@pytest.mark.parametrize("kind", ["folder", "npz"])
@pytest.mark.parametrize("whole", [True, False], ids=["finished", "unfinished"])
def test_images_of_another_origin_are_refused_and_left_alone(tmp_path, kind, whole):
    where = place(kind, tmp_path / "there")
    limit = {} if whole else {"limit_predict_batches": 2}
    predict(tmp_path, module(), num_images=4, batch_size=1, trainer_settings=limit, **where)
    before = content(tmp_path / "there")
    assert len(before) == {"npz": 2 if whole else 3, "folder": 5 if whole else 3}[kind]
    for name, other in OTHERS.items():
        with pytest.raises(FileError, match=f"^{kind}: .* made with {name} .* this run has"):
            predict(tmp_path, other(), num_images=4, **where)
    with pytest.raises(FileError, match="made with precision 32-true, and this run has bf16-mixed"):
        predict(
            tmp_path, module(), num_images=4, trainer_settings={"precision": "bf16-mixed"}, **where
        )
    assert content(tmp_path / "there") == before


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_an_interrupted_prediction_goes_on(tmp_path, kind, capsys):
    parts, whole = place(kind, tmp_path / "parts"), place(kind, tmp_path / "whole")
    limit = {"limit_predict_batches": 2}
    predict(tmp_path, module(), num_images=5, batch_size=1, trainer_settings=limit, **parts)
    assert f"2 of 5 images are in {parts[kind]}" in capsys.readouterr().out
    predict(tmp_path, module(), num_images=5, batch_size=4, **parts)
    predict(tmp_path, module(), num_images=5, **whole)
    files = [sorted((tmp_path / n).rglob("*.*")) for n in ("parts", "whole")]
    assert [p.name for p in files[0]] == [p.name for p in files[1]]
    assert len(files[0]) == (2 if kind == "npz" else 6)
    for one, other in zip(*files, strict=True):
        if one.suffix == ".npz":
            assert np.array_equal(np.load(one)["arr_0"], np.load(other)["arr_0"])
        else:
            assert one.read_bytes() == other.read_bytes()
    capsys.readouterr()
    predict(tmp_path, module(), num_images=5, **parts)  # nothing is missing
    assert f"5 images are in {parts[kind]}" in capsys.readouterr().out


def foreign(path, names):
    path.mkdir(parents=True)
    for name in names:
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".npz":
            np.savez(target, arr_0=np.zeros((4, 8, 8, 1), dtype=np.uint8))
        elif target.suffix in {".json", ".bin"}:
            target.write_text('{"weights": "0123456789abcdef", "seed": 0}')
        else:
            Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(target)


# What lies there, in what kind of place.
FOREIGN = {
    "all images": ("folder", [f"images/{i:06d}.png" for i in range(4)]),
    "one image": ("folder", ["images/000000.png"]),
    "a photo": ("folder", ["images/cat.jpg"]),
    "classes": ("folder", ["images/ant/1.png"]),
    "a folder with a foreign note": ("folder", ["images/identity.json"]),
    "finished": ("npz", ["all.npz"]),
    "finished by 0.1": ("npz", ["all.npz", "all.npz.json"]),
    "unfinished by 0.1": ("npz", ["all.npz.parts/rank_0.bin", "all.npz.json"]),
    "unfinished without a note": ("npz", ["all.npz.parts/rank_0.bin"]),
}


@pytest.mark.parametrize(("kind", "names"), FOREIGN.values(), ids=FOREIGN)
def test_images_of_unknown_origin_are_refused_and_left_alone(tmp_path, kind, names):
    foreign(tmp_path / "there", names)
    before = content(tmp_path / "there")
    with pytest.raises(FileError, match=rf"^{kind}: .* holds images.*choose another"):
        predict(tmp_path, module(), num_images=4, **place(kind, tmp_path / "there"))
    assert content(tmp_path / "there") == before


def test_only_names_that_are_written_here_count_as_drawn(tmp_path):
    files = PngSamples(tmp_path)
    files.write([3], pictures()[:1])
    for name in ("7.png", "00000008.png", "٠٠٠٠٠٩.png", "x000004.png"):
        (tmp_path / name).write_bytes((tmp_path / "000003.png").read_bytes())
    assert files.present() == {3}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_images": 0}, "found 0"),
        ({"folder": "a", "npz": "b.npz"}, "npz: must be None if a folder is given"),
        ({"npz": "b.zip"}, "must end in .npz, found b.zip"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        SampleWriter(**settings)


def test_a_data_module_forgets_what_was_to_be_drawn(tmp_path):
    data = DigitsData()
    trainer(tmp_path, SampleWriter(num_images=2)).predict(module(), data)
    with pytest.raises(ConfigError, match="predict: needs to know which images"):
        trainer(tmp_path).predict(module(), data)
    with pytest.raises(FileError, match="made with seed 0"):
        trainer(tmp_path, SampleWriter(num_images=2)).predict(module(seed=1), data)
    with pytest.raises(ConfigError, match="predict: needs to know which images"):
        trainer(tmp_path).predict(module(), data)


def test_latents_are_not_written_as_pictures(tmp_path):
    model = module()
    model.latent_space = LatentSpace(kind="kl", scale=1.0, shift=0.0, fingerprint="", source="")
    with pytest.raises(ConfigError, match=r"model\.first_stage: needed to decode"):
        predict(tmp_path, model, num_images=2, folder=str(tmp_path / "images"))
    assert not (tmp_path / "images").exists()


def test_classes_are_given_by_number_or_name():
    names = ["ball", "dahlia", "temple"]
    known = {"num_classes": 3, "most": 3}
    assert class_numbers(["temple", 0, 3], names, **known) == [2, 0, 3]
    with pytest.raises(ConfigError, match="must be 0 ball, 1 dahlia, 2 temple, or 3 for no class,"):
        class_numbers(["bal"], names, **known)
    with pytest.raises(ConfigError, match="classes: must be from 0 to 2, found ball"):
        class_numbers(["ball"], [], num_classes=3, most=2)


def test_classes_take_turns_and_must_exist(tmp_path):
    model = module()
    predict(tmp_path, model, num_images=5, batch_size=2, classes=[7, 2], folder=str(tmp_path / "a"))
    drawn = torch.cat(list(StoredImages(tmp_path / "a").batches(batch_size=5)))
    expected = model.sample(5, labels=[7, 2, 7, 2, 7])
    assert torch.equal(drawn, to_uint8(expected))
    assert not torch.equal(drawn, to_uint8(model.sample(5)))
    with pytest.raises(ConfigError, match=r"made with classes \[7, 2\], and this run has \[1\]"):
        predict(tmp_path, model, num_images=5, classes=[1], folder=str(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"must be from 0 to 9, or 10 for no class, found 11"):
        predict(tmp_path, model, num_images=5, classes=[11])
    with pytest.raises(ConfigError, match="classes: must be None or at least one class"):
        SampleWriter(classes=[])
