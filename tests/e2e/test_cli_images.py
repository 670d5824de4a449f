"""`ant-lightning test --images`: images that were drawn before, by whatever program."""

import json
from pathlib import Path

import numpy as np
import pytest

from ant_lightning import DigitsData, GenerationMetrics, GenerationScores
from ant_lightning.cli.main import main
from ant_lightning.cli.parser import run

BASE = Path(__file__).resolve().parents[2] / "configs" / "digits" / "dit.yaml"


def arguments(folder, *options):
    return [
        "test",
        f"--config={BASE}",
        "--model.init_args.backbone.init_args.depth=1",
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
        *options,
    ]


def test_an_npz_is_scored_without_a_checkpoint(tmp_path):
    data, npz = DigitsData(), tmp_path / "drawn.npz"
    images = np.concatenate(list(data.pixels(data.train_images, limit=100)))
    np.savez(npz, arr_0=images.transpose(0, 2, 3, 1))
    cli = run(arguments(tmp_path, f"--images={npz}"))
    metrics = next(c for c in cli.trainer.callbacks if isinstance(c, GenerationMetrics))
    held_out = np.concatenate(list(data.pixels(data.held_out_images)))
    import torch

    expected = GenerationScores(seed=0).evaluate(
        torch.from_numpy(images), torch.from_numpy(held_out), metrics.extractor
    )
    logged = {name: float(v) for name, v in cli.trainer.callback_metrics.items()}
    # The extractor rounds by batch, and the batches are not the same.
    assert logged["test/fid"] == pytest.approx(expected["fid"], rel=1e-3)
    # They are training images.
    assert logged["test/nearest_train_median"] == pytest.approx(0, abs=1e-3)
    assert "test/loss" not in logged
    row = json.loads(next(tmp_path.rglob("generation_metrics.jsonl")).read_text())
    assert (row["images"], row["scores"]["num_images"]) == (str(npz), 100)


def test_what_cannot_be_scored_is_named(tmp_path, capsys):
    assert main(arguments(tmp_path, "--images=nowhere.npz")) == 2
    assert "nowhere.npz" in capsys.readouterr().err
