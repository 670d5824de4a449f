"""GenerationMetrics on stored images, its cache, and what it leaves behind."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_digits import module, trainer

from ant_lightning import (
    ConfigError,
    DigitsData,
    DigitsFeatures,
    GenerationMetrics,
    GenerationScores,
    StoredImages,
)

# 60 images do for equality, not for a FID that means something.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ant_lightning.generation.frechet.RankDeficientWarning"
)


@pytest.fixture(scope="module")
def extractor():
    return DigitsFeatures()


@pytest.fixture(scope="module")
def images():
    noise = torch.Generator().manual_seed(0)
    data = DigitsData()
    real = torch.cat(list(data.pixels(data.train_images, limit=60))).int()
    return (real + torch.randint(-20, 20, real.shape, generator=noise)).clamp(0, 255).byte()


def scored(folder, where, extractor, **settings):
    callback = GenerationMetrics(extractor, **settings)
    run = trainer(folder, callback, limit_test_batches=1)
    logged = run.test(StoredImages(where), DigitsData(), verbose=False)[0]
    assert logged == {f"test/{k}": pytest.approx(v) for k, v in callback.last_scores.items()}
    return callback.last_scores


def test_folder_and_npz_score_as_the_metrics_themselves(tmp_path, images, extractor):
    data = DigitsData()
    expected = GenerationScores(seed=0).evaluate(
        images,
        torch.cat(list(data.pixels(data.held_out_images))),
        extractor,
        train_images=data.pixels(data.train_images),
    )
    folder, npz = tmp_path / "png", tmp_path / "all.npz"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:03d}.png")
    np.savez(npz, arr_0=images.permute(0, 2, 3, 1).numpy())
    for where in (folder, npz):
        scores = scored(tmp_path, where, extractor, batch_size=17)
        assert scores.keys() == expected.keys()
        assert {"kid", "inception_score", "fid_train"} <= scores.keys()
        assert scores == {k: pytest.approx(v, rel=1e-4, abs=1e-5) for k, v in expected.items()}
    row = json.loads((tmp_path / "generation_metrics.jsonl").read_text().splitlines()[-1])
    assert row["images"] == str(npz)
    assert row["scores"]["num_images"] == 60
    assert scored(tmp_path, npz, extractor, num_images=30)["num_images"] == 30


def test_training_images_may_be_the_reference(tmp_path, images, extractor):
    data = DigitsData()
    expected = GenerationScores(seed=0).evaluate(
        images, torch.cat(list(data.pixels(data.train_images))), extractor
    )
    npz = tmp_path / "all.npz"
    np.savez(npz, arr_0=images.permute(0, 2, 3, 1).numpy())
    scores = scored(tmp_path, npz, extractor, reference="train", with_train=False)
    assert scores == {k: pytest.approx(v, rel=1e-4, abs=1e-5) for k, v in expected.items()}
    assert json.loads((tmp_path / "generation_metrics.jsonl").read_text())["reference"] == "train"
    with pytest.raises(ConfigError, match="with_train: must be false where training images are"):
        GenerationMetrics(extractor, reference="train")


def test_bad_image_sets_are_named(tmp_path, images, extractor):
    for path, words in [
        (tmp_path / "nowhere", "nowhere"),
        (tmp_path / "wide.npz", "16"),
        (tmp_path / "sizes", "b.png must be 8 x 8"),
        (tmp_path / "few.npz", "holds 5 images, found 6"),
    ]:
        if path.name == "wide.npz":
            np.savez(path, arr_0=np.zeros((5, 8, 8, 1), dtype=np.uint16))
        if path.name == "few.npz":
            np.savez(path, arr_0=np.zeros((5, 8, 8, 1), dtype=np.uint8))
        if path.name == "sizes":
            path.mkdir()
            for name, side in (("a.png", 8), ("b.png", 9)):
                Image.fromarray(np.zeros((side, side), dtype=np.uint8)).save(path / name)
        num = 6 if path.name == "few.npz" else None
        with pytest.raises(ConfigError, match=words):
            scored(tmp_path, path, extractor, num_images=num)


def test_another_resolution_than_the_reference_is_refused(tmp_path, images, extractor):
    class Any8(DigitsFeatures):
        def extract(self, images):
            return super().extract(images[..., :8, :8])

    npz = tmp_path / "large.npz"
    np.savez(npz, arr_0=np.zeros((9, 16, 16, 1), dtype=np.uint8))
    with pytest.raises(ConfigError, match=r"\(1, 16, 16\).*\(1, 8, 8\)"):
        scored(tmp_path, npz, Any8())


class Counting(DigitsFeatures):
    seen = 0

    def extract(self, images):
        type(self).seen += len(images)
        return super().extract(images)


def test_real_images_are_looked_at_once_for_each_data_set_and_extractor(tmp_path):
    cache = tmp_path / "cache"

    def measure(data):
        Counting.seen = 0
        callback = GenerationMetrics(Counting(), num_images=12, cache_dir=str(cache))
        trainer(tmp_path, callback, limit_val_batches=1).validate(module(), data, verbose=False)
        return callback.last_scores, Counting.seen - 12

    first, seen = measure(DigitsData())
    assert seen == 1797
    again, seen = measure(DigitsData())
    assert seen == 0
    assert again == first
    assert len(list(cache.iterdir())) == 2
    _, seen = measure(DigitsData(split_seed=1))
    assert seen == 1797
    damaged = sorted(cache.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.warns(UserWarning, match="computed again"):
        again = [measure(DigitsData(split_seed=seed))[0] for seed in (1, 0)][1]
    assert again == first
    assert (tmp_path / "2_quality_history.png").exists()
