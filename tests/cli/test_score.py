"""`ant-lightning score`: images that were drawn before, by whatever program."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from ant_lightning import (
    ConfigError,
    DigitsData,
    DigitsFeatures,
    GenerationMetrics,
    GenerationScores,
    ImageFeatures,
    StoredImages,
)
from ant_lightning.cli.main import main
from ant_lightning.cli.score import run_score, score_images

BASE = Path(__file__).resolve().parents[2] / "configs" / "digits" / "dit.yaml"
# 60 images do for equality, not for a FID that means something.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ant_lightning.generation.frechet.RankDeficientWarning"
)


@pytest.fixture(scope="module")
def images():
    noise = torch.Generator().manual_seed(0)
    data = DigitsData()
    real = torch.cat(list(data.pixels(data.train_images, limit=60))).int()
    return (real + torch.randint(-20, 20, real.shape, generator=noise)).clamp(0, 255).byte()


@pytest.fixture
def npz(tmp_path, images):
    np.savez(tmp_path / "all.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    return tmp_path / "all.npz"


def expected(images):
    data, extractor = DigitsData(), DigitsFeatures()
    found = {}
    for dataset, name in ((data.held_out_images, "real"), (data.train_images, "train")):
        features = ImageFeatures(extractor)
        for batch in data.pixels(dataset):
            features.update(batch)
        found[name] = features.compute()
    scores = GenerationScores(extractor, seed=0, **found)
    scores.update(images)
    return scores.compute()


def test_the_config_of_a_run_is_enough(npz, images, tmp_path, capsys):
    output = tmp_path / "scores.jsonl"
    options = [f"--config={BASE}", "--images", str(npz), "--accelerator=cpu"]
    scores = run_score([*options, f"--output={output}"])
    # An extractor rounds by batch.
    assert scores == pytest.approx(expected(images), rel=1e-4, abs=1e-5)
    assert {"kid", "inception_score", "fid_train", "nearest_train_median"} <= scores.keys()
    first, last, about, *table = capsys.readouterr().out.splitlines()
    assert (first, last) == ("score: 0 of 60 images", "score: 60 of 60 images")
    assert about == (
        f"score: features of the network for digits of ant_lightning ({DigitsFeatures().name}), "
        "60 stored images against 360 held-out images"
    )
    assert table[0].split() == ["fid", f"{scores['fid']:.6g}"]
    row = json.loads(output.read_text())
    assert (row["images"], row["scores"]) == (str(npz), scores)
    part = run_score([*options, "--metrics.num_images=30", "--metrics.with_train=false"])
    assert part["num_images"] == 30
    assert "fid_train" not in part


def test_a_folder_is_scored_in_the_order_of_its_names(tmp_path, images):
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i:03d}.png")
    metrics = GenerationMetrics(DigitsFeatures(), batch_size=17, seed=0)
    found = score_images(metrics, DigitsData(), StoredImages(tmp_path), L.Fabric(accelerator="cpu"))
    assert found == pytest.approx(expected(images), rel=1e-4, abs=1e-5)


def test_what_cannot_be_scored_is_named(tmp_path, npz, capsys):
    def error(*options):
        assert main(["score", f"--config={BASE}", "--accelerator=cpu", *options]) == 2
        return capsys.readouterr().err

    assert "images: must be a folder or an npz file, found nothing at nowhere.npz" in error(
        "--images=nowhere.npz"
    )
    assert "metrics.num_images: must be 1 (ranks) to 60" in error(
        f"--images={npz}", "--metrics.num_images=61"
    )
    np.savez(tmp_path / "wide.npz", arr_0=np.zeros((5, 8, 8, 1), dtype=np.uint16))
    assert "uint16" in error(f"--images={tmp_path / 'wide.npz'}")
    (tmp_path / "sizes").mkdir()
    for name, side in (("a.png", 8), ("b.png", 9)):
        Image.fromarray(np.zeros((side, side), dtype=np.uint8)).save(tmp_path / "sizes" / name)
    line = "images: must all be 8 x 8 as a.png, found 9 x 9 in"
    assert line in error(f"--images={tmp_path / 'sizes'}")
    old = tmp_path / "old.yaml"
    old.write_text("data: {class_path: ant_lightning.data.DigitsData, init_args: {batch_size: 8}}")
    assert "ant_lightning.data.DigitsData for ant_lightning.DigitsData" in error(
        f"--config={old}", f"--images={npz}"
    )
    assert main(["test", f"--config={BASE}", f"--images={npz}"]) == 2
    assert "ant-lightning score --images" in capsys.readouterr().err


def test_another_size_than_that_of_the_reference_is_refused(tmp_path):
    class Any8(DigitsFeatures):
        def extract(self, images):
            return super().extract(images[..., :8, :8])

    np.savez(tmp_path / "large.npz", arr_0=np.zeros((9, 16, 16, 1), dtype=np.uint8))
    images = StoredImages(tmp_path / "large.npz")
    with pytest.raises(ConfigError, match=r"must be 8 x 8 with 1 channel, .* 16 x 16"):
        score_images(GenerationMetrics(Any8()), DigitsData(), images, L.Fabric(accelerator="cpu"))


def test_help_lists_every_extractor_of_the_package(capsys):
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    for name in ("ShapesFeatures", "DigitsFeatures", "DINOv2Features", "CLIPFeatures"):
        assert f"ant_lightning.{name}" in shown
