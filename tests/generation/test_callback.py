"""What `GenerationMetrics` keeps of real images, and what it leaves behind."""

import json
import re

import pytest
import torch
from tiny_digits import module, trainer

from ant_lightning import (
    ConfigError,
    Dashboard,
    DigitsData,
    DigitsFeatures,
    GenerationMetrics,
    InceptionFeatures,
    ModuleFeatures,
)
from ant_lightning.callbacks import dashboard

# 60 images do for equality, not for a FID that means something.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ant_lightning.generation.frechet.RankDeficientWarning"
)


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


def test_training_images_may_be_the_reference(tmp_path):
    callback = GenerationMetrics(
        DigitsFeatures(), num_images=12, reference="train", with_train=False
    )
    run = trainer(tmp_path, callback, limit_test_batches=1)
    (logged,) = run.test(module(), DigitsData(), verbose=False)
    scores = {f"test/{name}": value for name, value in callback.last_scores.items()}
    assert {name: value for name, value in logged.items() if name in scores} == pytest.approx(
        scores, rel=1e-6
    )
    assert scores["test/num_real"] == len(DigitsData().train_images)
    (row,) = (tmp_path / "generation_metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["reference"] == "train"
    with pytest.raises(ConfigError, match="with_train: must be false if training images are"):
        GenerationMetrics(DigitsFeatures(), reference="train")


def test_the_page_names_a_network_that_is_not_inception(tmp_path, monkeypatch):
    lines = []
    draw = dashboard.stacked_page
    monkeypatch.setattr(
        dashboard, "stacked_page", lambda *a, numbers: lines.append(numbers) or draw(*a)
    )
    pixels = ModuleFeatures(torch.nn.Flatten(), num_features=64, name="pixels")
    for extractor in (DigitsFeatures(), pixels):
        callback = GenerationMetrics(extractor, num_images=12, with_train=False, k=0)
        run = trainer(tmp_path, callback, Dashboard(), limit_val_batches=1)
        run.validate(module(), DigitsData(), verbose=False)
    assert [re.search(r"FID (.*?) \d[^ ]*,  of real images \d", each)[1] for each in lines] == [
        "(DigitsFeatures)",
        "(pixels)",
    ]
    inception = InceptionFeatures.__new__(InceptionFeatures)  # its weights may not be here
    assert GenerationMetrics(inception).scored_by == GenerationMetrics().scored_by == ""
