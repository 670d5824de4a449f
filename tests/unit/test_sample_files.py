"""Images reach a folder or an npz file whole, once, and in the order of their indices."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_digits import TinyDiT, module, trainer

from ant_lightning.callbacks import SampleWriter
from ant_lightning.callbacks.sample_files import NpzSamples, PngSamples
from ant_lightning.data import DigitsData
from ant_lightning.errors import ConfigError
from ant_lightning.metrics import image_batches


def pictures(channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (7, channels, 4, 5), generator=generator, dtype=torch.uint8)


def test_ranks_and_killed_runs_make_one_npz(tmp_path):
    path, images = tmp_path / "all.npz", pictures()
    first, second = (NpzSamples(path, num_images=7, rank=rank) for rank in (0, 1))
    assert first.present() == set()
    first.write([4, 0], images[[4, 0]])
    second.write([5], images[[5]])
    part = tmp_path / "all.npz.parts" / "rank_0.bin"
    with part.open("ab") as file:  # killed in the middle of a record
        file.write((2).to_bytes(8, "little") + b"\x07" * 30)
    again = NpzSamples(path, num_images=7, rank=0)
    assert again.present() == {0, 4, 5}
    again.write([1, 2, 3, 6], images[[1, 2, 3, 6]])
    assert again.present() == set(range(7))
    again.finish()
    stored = np.load(path, allow_pickle=False)["arr_0"]
    assert stored.dtype == np.uint8
    assert np.array_equal(stored, images.permute(0, 2, 3, 1).numpy())
    assert torch.equal(torch.cat(list(image_batches(path, batch_size=3))), images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.npz"]
    assert NpzSamples(path, num_images=7, rank=0).present() == set(range(7))
    with pytest.raises(ConfigError, match=r"7 images.*num_images 9"):
        NpzSamples(path, num_images=9, rank=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_hold_the_pixels(tmp_path, channels):
    files, images = PngSamples(tmp_path), pictures(channels)
    files.write([3, 12], images[:2])
    assert files.present() == {3, 12}
    stored = np.asarray(Image.open(tmp_path / "000012.png")).reshape(4, 5, channels)
    assert np.array_equal(stored, images[1].permute(1, 2, 0).numpy())


def predict(tmp_path, model, **settings):
    writer = SampleWriter(**settings)
    run = trainer(tmp_path, writer)
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
    pngs = [np.asarray(Image.open(p)) for p in sorted(folder.iterdir())]
    assert np.array_equal(np.stack(pngs)[..., None], whole)
    note = json.loads(Path(f"{folder}.json").read_text())
    assert (note["seed"], note["guidance_scale"]) == (0, 1.0)
    assert "num_steps=2" in note["sampler"]


def test_images_of_other_weights_or_settings_are_not_mixed(tmp_path):
    settings = {"folder": str(tmp_path / "png")}
    predict(tmp_path, module(), num_images=2, **settings)
    for other, name in [
        (module(TinyDiT(seed=1)), "weights"),
        (module(guidance_scale=3.0), "guidance_scale"),
    ]:
        with pytest.raises(ConfigError, match=f"other {name}"):
            predict(tmp_path, other, num_images=4, **settings)
    assert len(list((tmp_path / "png").iterdir())) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_images": 0}, "found 0"),
        ({"folder": "a", "npz": "b.npz"}, "not both"),
        ({"npz": "b.zip"}, "must end in .npz, found b.zip"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        SampleWriter(**settings)
